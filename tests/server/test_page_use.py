"""The page in the hands of a user: keyboard, mouse and finger, any screen, and nothing from outside."""

import pytest

from tests.server.browser import BINARY
from tests.server.pages import DONE, NOW, checked, give, make, text
from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium: apt-get install chromium")


def test_it_is_complete_by_itself(server, visit):
    page = visit(server)
    assert page.complaints() == []
    assert page.requested() and all(url.startswith(f"{server.url}/") for url in page.requested())
    assert text(page, "#model") == "checkpoint \u00b7 JPEG 32 \u00d7 32 \u00b7 quality 25 \u00b7 context 400"
    assert text(page, "#generate") == "Generate from nothing"
    # the page itself forbids what is not the server's
    page.evaluate("fetch('http://127.0.0.1:1/').catch(() => null)")
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


def test_the_line_is_moved_by_keys_mouse_and_finger(server, visit):
    page = visit(server, phone=True)
    give(page)
    for key, patches in [
        ("Home", 1),
        ("ArrowDown", 3),
        ("ArrowLeft", 2),
        ("End", 3),
        ("ArrowUp", 1),
        ("a", 1),
    ]:
        page.key(key)
        assert page.evaluate(NOW) == patches
    words = "document.querySelector('#line').getAttribute('aria-valuetext')"
    assert page.evaluate(words) == "1 of 4 patches, 25 percent"
    x, y, side = page.evaluate(
        "(({x, y, width}) => [x, y, width])(document.querySelector('#stage').getBoundingClientRect())"
    )
    for kind, share in [("mousePressed", 0.26), ("mouseMoved", 0.5), ("mouseReleased", 0.74)]:
        page.send(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x + side / 2,
            y=y + share * side,
            button="left",
            buttons=1,
            clickCount=1,
        )
    assert page.evaluate(NOW) == 2  # where it was when the button was let go, which moves nothing by itself

    def touch(kind, *shares):
        points = [{"x": x + side / 2, "y": y + share * side} for share in shares]
        page.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", 0.5)
    for share in (0.55, 0.65, 0.76):
        touch("touchMove", share)
    touch("touchEnd")
    assert page.evaluate(NOW) == 3
    touch("touchStart", 0.2)  # beside the line a finger scrolls
    touch("touchEnd")
    assert page.evaluate(NOW) == 3


def test_pictures_are_dropped_pasted_and_removed(server, visit):
    page = visit(server)
    page.evaluate("""(async () => {
        const canvas = document.createElement("canvas");
        const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
        const data = new DataTransfer();
        data.items.add(new File([blob], "a.png", {type: "image/png"}));
        return data;
    })().then((data) => window.data = data)""")
    page.evaluate("document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))")
    page.wait("picture")
    assert text(page, "#generate") == "Complete the picture"
    page.click("#remove")
    assert page.evaluate("picture") is None and text(page, "#generate") == "Generate from nothing"
    page.evaluate("document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}))")
    page.wait("picture")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1200])
def test_it_fits_and_can_be_read(server, visit, width, dark):
    page = visit(server, width=width, height=700, dark=dark, phone=width < 1000)
    page.evaluate("document.head.append(Object.assign(document.createElement('style'),"
                  "{textContent: '* {transition: none !important}'}))")  # fmt: skip
    with checked(page, width, dark):
        pass
    with checked(page, width, dark):
        give(page)
    with checked(page, width, dark):
        make(page, n=5, seed=2**40, min_p=0.1, top_k=50)
        page.wait(DONE)
    with checked(page, width, dark):
        make(page, min_p=5)
        page.wait("!document.querySelector('#problem').hidden")


def test_a_press_that_hits_something_else_is_made_again(server, visit):
    """Of the tests' own mouse: a page that scrolls on has another element there for a moment."""
    page = visit(server)
    page.evaluate("""(() => {
        const cover = document.createElement("div");
        cover.style.cssText = "position: fixed; inset: 0; z-index: 9";
        cover.onmousedown = () => cover.remove();
        document.body.append(cover);
    })()""")
    make(page, n=1)
    page.wait(DONE)


def test_everything_is_reached_by_keyboard(server, visit):
    page = visit(server)
    give(page)
    make(page, n=1)
    page.wait(DONE)
    page.evaluate("$('line').focus()")
    reached = []
    for _ in range(14):
        page.key("Tab")
        script = "(({id, name, className}) => id || name || className)(document.activeElement)"
        reached.append(page.evaluate(script))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
    fields = ["n", "seed", "temperature", "top_k", "top_p", "min_p", "constrain"]
    actions = ["keep", "repeat", "again", "all", "plain download"]
    assert reached == ["remove", *fields, "generate", *actions]
    page.evaluate("document.querySelector('[name=seed]').focus()")
    page.key("Enter")
    page.wait("document.querySelectorAll('.run').length == 2 && !running")


def test_no_motion_where_none_is_wanted(server, visit):
    page = visit(server)
    motion = "getComputedStyle(document.querySelector('#generate')).transitionDuration"
    assert page.evaluate(motion) != "0s"
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    assert page.evaluate(motion) == "0s"


def test_its_files_need_no_key_and_no_others_are_served():
    with serving(ScriptedLoop(), api_key="a secret") as server:
        server.client.headers.pop("authorization")
        for name, kind in [("page.css", "text/css"), ("make.js", "text/javascript")]:
            reply = server.client.get(f"/page/{name}")
            assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        for name in ("index.html", "nothing.js", "..%2Fserve.py", "../serve.py", "%2e%2e"):
            assert server.client.get(f"/page/{name}").status_code in (401, 404)
        assert server.client.get("/v1/models").status_code == 401

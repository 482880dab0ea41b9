"""The page, in a real browser and before real servers: what is made, and what is said where it is not."""

import base64

import pytest
from PIL import Image

from megatron_codec.inference import Engine
from megatron_codec.inference.loop import EngineLoop
from tests.server.browser import BINARY
from tests.server.pages import DONE, NOW, PHOTO, STATES, downloads, give, make, text
from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving, until

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium: apt-get install chromium")
SOURCES = "[...document.querySelectorAll('.run:first-child figure img')].map((image) => image.src)"


@pytest.fixture(scope="module")
def real_server(trained):
    """One before the engine with a small trained model."""
    with serving(EngineLoop(Engine.load(trained.folder)), load=trained.folder) as running:
        yield running


def test_pictures_from_nothing_are_those_of_the_api(real_server, visit, browser):
    page = visit(real_server)
    make(page, n=3, seed=5, temperature=0.9, top_k=100)
    page.wait(DONE)
    body = {"n": 3, "seed": 5, "temperature": 0.9, "top_k": 100}
    expected = real_server.client.post("/v1/images/generations", json=body).json()["data"]
    verdicts = page.evaluate(
        "[...document.querySelectorAll('.verdict')].map((verdict) => verdict.textContent)"
    )
    facts = page.evaluate("[...document.querySelectorAll('.facts')].map((facts) => facts.textContent)")
    for item, verdict, fact in zip(expected, verdicts, facts, strict=True):
        assert verdict == ("Valid file" if item["valid"] else f"Not valid: {item['reason']}")
        assert fact.startswith(f"{item['new_tokens']} tokens")
        assert f"{item['redrawn']} redrawn ({100 * item['removed']:.1f}" in fact
    files = [base64.b64decode(item["b64_json"]) for item in expected]
    name = real_server.client.get("/v1/models").json()["data"][0]["id"]
    page.click(".all")
    assert downloads(browser, 3) == {f"{name}-5-{i + 1}.jpg": file for i, file in enumerate(files)}
    page.click("figure:nth-child(2) .download")
    assert list(downloads(browser, 1).values()) == files[1:2]
    assert "Seed 5" in text(page, ".with") and "top-k 100" in text(page, ".with")
    assert "3 of 3 valid" in text(page, ".summary") and "0 valid without the grammar" in text(
        page, ".summary"
    )
    page.click("[name=constrain]")
    make(page, n=3, seed=5, temperature=0.9, top_k=100)
    page.wait(f"document.querySelectorAll('.run').length == 2 && {DONE}")
    free = real_server.client.post("/v1/images/generations", json=body | {"constrain": False}).json()["data"]
    found = page.evaluate("[...document.querySelectorAll('.run')[0].querySelectorAll('.verdict')]"
                          ".map((verdict) => verdict.textContent == 'Valid file')")  # fmt: skip
    assert found == [item["valid"] for item in free] and not all(found)
    assert "any bytes" in text(page, ".with") and "without the grammar" not in text(page, ".summary")
    assert page.complaints() == []


@pytest.mark.parametrize("key, patches", [("ArrowUp", 1), (None, 2), ("ArrowRight", 3)])
def test_a_picture_is_completed_from_the_line_on(real_server, visit, browser, key, patches):
    engine = real_server.loop.engine
    page = visit(real_server)
    give(page)
    if key:
        page.key(key)
    assert page.evaluate(NOW) == patches
    assert text(page, "#given").startswith(f"Given: {patches} of 4 patches")
    make(page, n=2, seed=6)
    page.wait(DONE)
    assert len(page.evaluate(STATES)) == 2
    page.click(".all")
    files = list(downloads(browser, 2).values())
    given = engine.codec.prompt(engine.codec.encode(Image.open(PHOTO)), patches / 4)
    assert all(file.startswith(engine.codec.to_file(given)[:-2]) for file in files)
    body = {
        "n": 2,
        "seed": 6,
        "prompt_ratio": patches / 4,
        "image": base64.b64encode(PHOTO.read_bytes()).decode(),
    }
    expected = real_server.client.post("/v1/images/edits", json=body).json()["data"]
    assert files == [base64.b64decode(item["b64_json"]) for item in expected]
    assert page.complaints() == []


def test_a_picture_larger_than_the_server_takes_is_made_small_before(visit, tmp_path):
    file = tmp_path / "noise.png"
    Image.effect_noise((500, 500), 100).save(file)
    with serving(ScriptedLoop(), max_body_bytes=100_000) as server:
        assert file.stat().st_size > 100_000
        page = visit(server)
        give(page, file)
        assert page.evaluate("[picture.body.type, picture.body.size < 5000]") == ["image/png", True]
        make(page, n=1)
        page.wait(DONE)
        assert page.evaluate("document.querySelector('#problem').hidden") and page.complaints() == []


def test_tiles_grow(slow_server, visit):
    page = visit(slow_server)
    page.evaluate("""seen = []; new MutationObserver(() => seen.push([
        document.querySelector("progress").value,
        document.querySelector("figure img")?.style.clipPath ?? "",
    ])).observe(document.querySelector("#results"), {subtree: true, childList: true})""")
    make(page, n=2, seed=1)
    page.wait("document.activeElement.id == 'stop' && document.querySelector('progress').value > 0")
    assert "of 2 done" in text(page, ".summary") and "tokens/s" in text(page, ".summary")
    page.wait(DONE)
    assert page.evaluate(STATES) == ["valid", "valid"]
    seen = page.evaluate("seen")
    values = [value for value, _ in seen]
    assert values == sorted(values) and {0.25, 0.5, 0.75, 1} <= set(values)
    assert len({shape for _, shape in seen if shape}) == 3
    page.wait("document.querySelector('figure img').style.clipPath == ''")
    assert page.evaluate("document.querySelector('figure img').naturalWidth") == 32
    assert "2 of 2 valid" in text(page, ".summary")
    assert "2 of 2 valid" in text(page, "#live")


def test_stop_and_leaving_free_the_server(slow_server, visit):
    page = visit(slow_server)
    make(page, n=4)
    page.wait("document.querySelector('.with').textContent.startsWith('Seed')")  # the server has begun
    assert slow_server.loop.open_requests == 1
    page.click("#stop")
    page.wait(DONE)
    until(lambda: slow_server.loop.open_requests == 0, 2)
    assert set(page.evaluate(STATES)) == {"stopped"}
    assert page.evaluate("document.activeElement.id") == "generate"
    make(page, n=4)
    page.wait("running && document.querySelector('progress').value > 0")
    assert slow_server.loop.open_requests == 1
    page.close()
    until(lambda: slow_server.loop.open_requests == 0, 5)


def test_repeat_again_and_keep(server, visit):
    page = visit(server)
    make(page, n=2)
    page.wait(DONE)
    page.wait(f"{SOURCES}.length == 2")
    first, seed = (
        page.evaluate(SOURCES),
        page.evaluate("document.querySelector('.with').textContent.split(' ')[1]"),
    )
    page.click(".run .repeat")
    page.wait(f"document.querySelectorAll('.run').length == 2 && {DONE} && {SOURCES}.length == 2")
    assert page.evaluate(SOURCES) == first
    page.click(".run .again")
    page.wait(f"document.querySelectorAll('.run').length == 3 && {DONE} && {SOURCES}.length == 2")
    assert f"Seed {seed} " not in text(page, ".with")
    page.click(".run:last-of-type .keep")
    assert page.evaluate("document.querySelector('[name=seed]').value") == seed


def test_the_key_is_asked_for(browser, visit):
    with serving(ScriptedLoop(), api_key="a secret") as server:
        page = visit(server, ready=False)
        page.wait("document.querySelector('#ask').open")
        page.key("Escape")
        page.wait("document.querySelector('#state').textContent == 'needs a key'")
        make(page)
        for key, words in [("wrong", "It is kept"), ("a secret", "was not accepted")]:
            page.wait(f"$('ask').open && $('ask-why').textContent.includes({words!r})")
            page.type("#key", key)
            page.key("Enter")
        page.wait(DONE)
        assert set(page.evaluate(STATES)) == {"valid"}
        page.wait("document.querySelector('#state').textContent == 'ready'")
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.go(f"{server.url}/")  # the tab remembers it
        page.wait("document.querySelector('#state').textContent == 'ready'")
        assert not page.evaluate("document.querySelector('#ask').open")


def test_what_the_server_refuses_is_said(server, visit, tmp_path):
    page = visit(server)
    make(page, top_p=0)
    page.wait("!document.querySelector('#problem').hidden")
    assert "must lie above 0" in text(page, "#what")
    assert page.evaluate("[document.activeElement.name, document.activeElement.ariaInvalid]") == [
        "top_p",
        "true",
    ]
    make(page, top_p=1, n=17)  # the browser's own words, before anything is sent
    page.wait("document.querySelector('#what').textContent.startsWith('Pictures: ')")
    text_file = tmp_path / "words.png"
    text_file.write_text("no picture")
    page.choose("#file", text_file)
    page.wait("document.querySelector('#what').textContent == 'words.png cannot be read as a picture.'")
    make(page, n=1)
    page.wait(DONE)
    assert page.evaluate("document.querySelector('#problem').hidden")


def test_a_server_that_fails_or_goes_is_noticed(visit):
    with serving(ScriptedLoop(token_seconds=0.01)) as server:
        page = visit(server)
        make(page, n=2)
        page.wait("document.querySelector('progress').value > 0")
        server.loop.fail(RuntimeError("out of memory"))
        page.wait("!document.querySelector('#problem').hidden")
        assert "engine has failed" in text(page, "#what") and "started again" in text(page, "#todo")
        assert page.evaluate(STATES) == ["failed", "failed"]
    make(page)
    page.wait("document.querySelector('#what').textContent == 'The server does not answer.'")
    assert text(page, "#state") == "server does not answer"
    assert page.evaluate("document.querySelectorAll('.run').length") == 1

"""The page before a model of clips, in a real browser: what a user does, and what comes of it."""

import base64
import random

import pytest

from megatron_codec.codecs import AvcCodec
from megatron_codec.tokenizer import Tokenizer
from tests.server.browser import BINARY
from tests.server.pages import DONE, STATES, checked, downloads, make, text
from tests.server.scripted import Material, ScriptedLoop
from tests.server.serving import serving, until
from tests.videos import moving, write_video

pytestmark = pytest.mark.skipif(BINARY is None, reason="no chromium: apt-get install chromium")
CODEC = AvcCodec(frames=6, width=64, height=48)
FRAMES = moving(6)
SHOWN = "document.querySelectorAll('.run:first-child figure video').length"


def damaged(stream: bytes) -> bytes:
    """The stream with noise in its last frame."""
    start, rng = len(CODEC.first_frames(stream, 5)) + 12, random.Random(1)
    return stream[:start] + bytes(rng.randrange(1, 256) for _ in stream[start:])


@pytest.fixture(scope="module")
def material(upload):
    """The clip of the file that is given, and others; some are damaged, and one ends early."""
    whole = CODEC.encode(upload)
    streams = [
        whole,
        damaged(whole),
        CODEC.first_frames(whole, 4),
        CODEC.encode(moving(6)[:, :, ::-1].copy()),
    ]
    return Material(CODEC, streams, Tokenizer.train(streams, 300, codec=CODEC.to_dict()), 4000)


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", FRAMES, rate=3)


@pytest.fixture(scope="module")
def clip_server(material):
    with serving(ScriptedLoop(material=material)) as running:
        yield running


@pytest.fixture(scope="module")
def slow_clip_server(material):
    with serving(ScriptedLoop(token_seconds=0.002, material=material)) as running:
        yield running


def give(page, file):
    page.choose("#file", file)
    page.wait("clip && document.activeElement.id == 'frames' && $('clip').readyState >= 2")


def items(server, route, body):
    return server.client.post(f"/v1/videos/{route}", json=body).json()["data"]


def shown(page, what):
    return page.evaluate(
        f"[...document.querySelectorAll('.run:first-child .{what}')].map((element) => element.textContent)"
    )


def test_clips_from_nothing_are_those_of_the_api(clip_server, visit, browser):
    page = visit(clip_server)
    assert text(page, "#model") == (
        "checkpoint \u00b7 AVC 64 \u00d7 48 \u00b7 6 frames, 3 a second \u00b7 QP 37 \u00b7 context 4,000"
    )
    assert text(page, "#title").startswith("Clips") and text(page, "#count") == "Clips"
    make(page, n=4, seed=3)
    page.wait(f"{DONE} && {SHOWN} == 4")
    expected = items(clip_server, "generations", {"n": 4, "seed": 3})
    assert {item["valid"] for item in expected} == {True, False}
    assert 0 < max(item["share_made_up"] for item in expected) < 1
    for item, verdict, fact in zip(expected, shown(page, "verdict"), shown(page, "facts"), strict=True):
        assert verdict == ("Valid file" if item["valid"] else f"Not valid: {item['reason']}")
        assert fact.startswith(f"{item['new_tokens']} tokens")
        assert fact.endswith(f"{100 * item['share_made_up']:.1f}\u2009% concealed")
    page.wait("[...document.querySelectorAll('video[src]')].every((video) => video.videoWidth == 64)")
    assert page.evaluate("[...document.querySelectorAll('figure .strip')].every((strip) => strip.hidden)")
    page.click(".all")
    files = downloads(browser, 4, ".mp4")
    decoded = [base64.b64decode(item["b64_json"]) for item in expected]
    assert files == {f"checkpoint-3-{i + 1}.mp4": file for i, file in enumerate(decoded)}
    assert page.complaints() == []


def test_a_clip_is_completed_from_its_first_frames(clip_server, visit, browser, upload):
    page = visit(clip_server)
    give(page, upload)
    assert text(page, "#given") == "Given: 4 of 6 frames" and text(page, "#generate") == "Complete the clip"
    for key, count in [("Home", 1), ("ArrowLeft", 1), ("End", 5), ("ArrowLeft", 4), ("ArrowLeft", 3)]:
        page.key(key)
        assert text(page, "#given") == f"Given: {count} of 6 frames"
    page.wait("!$('clip').seeking && Math.floor($('clip').currentTime * 3) == 2")  # the last that is given
    make(page, n=2, seed=6)
    page.wait(f"{DONE} && {SHOWN} == 2")
    body = {"n": 2, "seed": 6, "prompt_frames": 3, "video": base64.b64encode(upload.read_bytes()).decode()}
    expected = items(clip_server, "edits", body)
    assert page.evaluate(STATES) == ["valid" if item["valid"] else "invalid" for item in expected]
    page.click(".all")
    found = list(downloads(browser, 2, ".mp4").values())
    assert found == [base64.b64decode(item["b64_json"]) for item in expected]
    assert "3 of 6 frames given" in text(page, ".with")
    # the frame that is seen is marked, and told apart
    page.evaluate("video = document.querySelector('figure video'); video.pause()")
    for frame, word in [(2, "given"), (3, "generated"), (0, "given")]:
        page.evaluate(f"video.currentTime = {(frame + 0.5) / 3}")
        at = "document.querySelector('figure .strip').style.getPropertyValue('--at')"
        page.wait(f"{at} == {frame} && document.querySelector('.badge').textContent == {word!r}")
    page.click("#remove")
    assert page.evaluate("clip") is None and text(page, "#generate") == "Generate from nothing"
    assert page.complaints() == []


def test_frames_are_counted_and_stop_frees_the_server(slow_clip_server, visit, upload):
    page = visit(slow_clip_server)
    give(page, upload)
    page.key("Home")
    make(page, n=2)
    page.wait("document.querySelector('.verdict').textContent == '2 of 6 frames'")
    assert page.evaluate("document.querySelector('progress').value") == pytest.approx(2 / 6)
    assert (
        page.evaluate("document.querySelector('figure img').naturalWidth") == 64
    )  # what is given, meanwhile
    page.key("Enter")  # the button to stop has the focus
    page.wait(DONE)
    until(lambda: slow_clip_server.loop.open_requests == 0, 2)
    assert set(page.evaluate(STATES)) == {"stopped"}


def test_a_dropped_clip_is_repeated_with_the_same_seed(clip_server, visit, browser, upload):
    page = visit(clip_server)
    content = base64.b64encode(upload.read_bytes()).decode()
    page.evaluate(f"""data = new DataTransfer(); data.items.add(new File(
        [Uint8Array.from(atob("{content}"), (letter) => letter.charCodeAt(0))], "a.mp4",
        {{type: "video/mp4"}}))""")
    page.evaluate("document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}))")
    page.wait("clip")
    make(page, n=3)
    page.wait(f"{DONE} && {SHOWN} == 3")
    page.click(".all")
    before = downloads(browser, 3, ".mp4")
    page.click(".run .repeat")
    page.wait(f"document.querySelectorAll('.run').length == 2 && {DONE} && {SHOWN} == 3")
    page.click(".run:first-child .all")
    assert downloads(browser, 3, ".mp4") == before
    assert page.complaints() == []


def test_what_is_no_video_is_refused(clip_server, visit, tmp_path):
    page = visit(clip_server)
    file = tmp_path / "words.mp4"
    file.write_text("no video")
    page.choose("#file", file)
    page.wait("document.querySelector('.no-preview')")  # the server may know more kinds than the browser
    make(page)
    page.wait("!document.querySelector('#problem').hidden")
    assert "cannot be made a clip" in text(page, "#what")
    assert page.evaluate("document.querySelectorAll('.run').length") == 0


def test_a_video_larger_than_the_server_takes_is_refused(material, upload, visit, tmp_path):
    file = tmp_path / "long.mp4"
    file.write_bytes(upload.read_bytes() + bytes(2**25))
    with serving(ScriptedLoop(material=material)) as server:
        page = visit(server)
        page.choose("#file", file)
        page.wait("!document.querySelector('#problem').hidden")
        assert text(page, "#what") == "long.mp4 has 33.6 MB, more than the 16.8 MB that this server takes."
        assert text(page, "#todo") == "Choose a smaller file."
        assert page.evaluate("clip") is None and page.complaints() == []
        # where the page has not known, the server's answer is shown
        page.evaluate("model.largest = Infinity")
        give(page, file)
        make(page)
        page.wait("!running && !document.querySelector('#problem').hidden")
        assert text(page, "#what").startswith("The body is larger than 16777216 bytes")
        assert text(page, "#todo") == "Choose a smaller file."
        page.click("#remove")
        make(page, n=1)
        page.wait(DONE)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 1200])
def test_it_fits_and_can_be_read(clip_server, visit, upload, width, dark):
    page = visit(clip_server, width=width, height=700, dark=dark, phone=width < 1000)
    page.evaluate("document.head.append(Object.assign(document.createElement('style'),"
                  "{textContent: '* {transition: none !important}'}))")  # fmt: skip
    with checked(page, width, dark):
        pass
    with checked(page, width, dark):
        give(page, upload)
    with checked(page, width, dark):
        make(page, n=3)
        page.wait(f"{DONE} && {SHOWN} == 3")

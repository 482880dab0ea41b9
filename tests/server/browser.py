"""Drives a headless Chromium over the DevTools protocol, by pipes: no driver and no websocket is needed.

    with Browser(folder) as browser:
        page = browser.open("http://127.0.0.1:5000/")
        page.evaluate("document.title")

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
)


class Browser:
    """A running browser.

    Args:
        folder: for its profile and for downloads.
    """

    def __init__(self, folder: Path):
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        to_browser, self._to = _pipe()
        self._from, from_browser = _pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        command = ["bash", "-c", shell, str(BINARY), *_FLAGS, f"--user-data-dir={folder / 'profile'}"]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number = b"", 0
        self._answers: dict[int, dict] = {}
        self.pages: dict[str, Page] = {}
        allow = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.send("Browser.setDownloadBehavior", allow)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.send("Browser.close", {})
            self._process.wait(10)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def open(self, url: str, width: int = 1200, height: int = 800, **settings: Any) -> "Page":
        """A new page at `url`, loaded. `settings` are `Page.look`'s."""
        target = self.send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            page.send(f"{domain}.enable")
        page.look(width, height, **settings)
        page.go(url)
        return page

    def send(
        self, method: str, params: dict[str, Any], session: str | None = None, seconds: float = 60
    ) -> dict[str, Any]:
        """Sends a command and returns its result. Raises RuntimeError if the browser refuses it."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        limit = time.monotonic() + seconds
        while number not in self._answers:
            if not self.read(limit - time.monotonic()):
                raise TimeoutError(f"{method} is not answered")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self, seconds: float) -> bool:
        """Takes in what the browser says within some time; False if that is nothing."""
        if not select.select([self._from], [], [], max(0, seconds))[0]:
            return False
        data = os.read(self._from, 1 << 20)
        if not data:
            raise EOFError("the browser has ended")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].events.append(message)
        return True


class Page:
    """A page of a browser.

    Attributes:
        events: what happened in it, each with `method` and `params`.
    """

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self.session, self.target = browser, session, target
        self.events: deque[dict[str, Any]] = deque()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command about this page."""
        return self.browser.send(method, params, self.session)

    def look(
        self, width: int, height: int, dark: bool = False, scale: float = 1, phone: bool = False
    ) -> None:
        """Sets the size of the window in CSS pixels, light or dark mode, and whether fingers are used."""
        mode = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.send("Emulation.setEmulatedMedia", features=mode)

    def go(self, url: str) -> None:
        """Loads `url`. Raises RuntimeError if nobody answers there."""
        if error := self.send("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {error}")
        self.wait("document.readyState == 'complete' && location.href != 'about:blank'")

    def close(self) -> None:
        """Closes the page, as a user does."""
        del self.browser.pages[self.session]
        self.browser.send("Target.closeTarget", {"targetId": self.target})

    def evaluate(self, script: str) -> Any:
        """The value of an expression; promises are waited for."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", expression=script, **options)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Returns as soon as an expression is true. Raises TimeoutError."""
        limit = time.monotonic() + seconds
        while True:
            try:
                if self.evaluate(f"Boolean({condition})"):
                    return
            except RuntimeError:  # between two documents there is no context to evaluate in
                if time.monotonic() > limit:
                    raise
            if time.monotonic() > limit:
                raise TimeoutError(condition)
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element, once it stands still. Raises TimeoutError.

        What scrolls smoothly may stand still and go on: a press that hits something else is let go outside of
        the page, where it does nothing, and made again.
        """
        script = f"""(async () => {{
            const element = document.querySelector({json.dumps(selector)});
            window.pressed = false;
            element.addEventListener("mousedown", () => window.pressed = true, {{once: true, capture: true}});
            for (let before = NaN; ; await new Promise(requestAnimationFrame)) {{
                element.scrollIntoView({{block: "center", behavior: "instant"}});
                const {{x, y, width, height}} = element.getBoundingClientRect();
                if (y === before) return [x + width / 2, y + height / 2];
                before = y;
            }}
        }})()"""
        limit = time.monotonic() + 10
        while time.monotonic() < limit:
            x, y = self.evaluate(script)
            self.mouse("mouseMoved", x, y)
            self.mouse("mousePressed", x, y)
            if self.evaluate("window.pressed"):
                self.mouse("mouseReleased", x, y)
                return
            self.mouse("mouseReleased", -1, -1)
        raise TimeoutError(f"{selector}: something lies over it")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Moves, presses or releases the mouse."""
        button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def key(self, key: str) -> None:
        """Presses a key: a name such as Tab or ArrowUp, or a character."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.send("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": text} if text else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, selector: str, text: str) -> None:
        """Replaces what is in a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.send("Input.insertText", text=text)
        else:
            self.evaluate(f"document.querySelector({json.dumps(selector)}).value = ''")

    def choose(self, selector: str, file: Path) -> None:
        """Chooses a file in a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        """Writes a PNG file of what is seen."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What has been written to the console as an error or a warning, and uncaught exceptions."""
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", details).get("description", details["text"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str([value.get("value", value.get("description")) for value in params["args"]]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """The URLs that were asked for, data: and blob: ones left out."""
        urls = [
            e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are none of those that are about to be replaced."""
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]

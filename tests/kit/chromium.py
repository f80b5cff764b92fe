"""Chromium through its DevTools protocol over a pipe: nothing besides the browser is needed, and no port is opened."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.skips import NO_CHROMIUM

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--hide-scrollbars --disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)
# The browser reads commands from descriptor 3 and answers on 4, whichever the pipes have here.
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 64) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
_WAIT = 60.0  # seconds for an answer: a busy machine starts a browser slowly

KEYS = {
    "Tab": 9, "Enter": 13, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38,
    "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip


def found() -> str | None:
    """The browser of this machine; QKV_CHROMIUM names another."""
    named = os.environ.get("QKV_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """A browser of its own, with an empty profile."""

    def __init__(self, folder: Path) -> None:
        path = found()
        if path is None:
            pytest.skip(NO_CHROMIUM)
        (theirs, self._to), (self._of, ours) = os.pipe(), os.pipe()
        command = [sys.executable, "-c", _START, str(theirs), str(ours), path, *_OPTIONS.split()]
        nothing = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs, ours), stdin=nothing, stdout=nothing, stderr=nothing,
        )  # fmt: skip
        os.close(theirs)
        os.close(ours)
        self._rest, self._next = b"", 0
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        try:
            self.call("Browser.close")
        except (AssertionError, OSError):
            self._process.kill()
        self._process.wait(_WAIT)
        os.close(self._to)
        os.close(self._of)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events on the way are kept."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._until(lambda answer: answer.get("id") == message["id"])

    def wait(self, session: str, method: str) -> dict[str, Any]:
        """The next event of that name that was not asked for before."""
        for event in self.events:
            if event.get("sessionId") == session and event["method"] == method and "taken" not in event:
                event["taken"] = True
                return event
        event = self._until(lambda answer: answer.get("method") == method and answer.get("sessionId") == session)
        event["taken"] = True
        return event

    def _until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + _WAIT
        while time.monotonic() < end:
            while b"\0" in self._rest:
                one, _, self._rest = self._rest.partition(b"\0")
                answer = json.loads(one)
                if "method" in answer:
                    self.events.append(answer)
                if wanted(answer):
                    assert "error" not in answer, answer
                    return answer
            if select.select([self._of], [], [], 1.0)[0]:
                more = os.read(self._of, 1 << 20)
                assert more, "the browser ended"
                self._rest += more
        raise AssertionError("the browser did not answer")


class Page:
    """A tab on a file, and what happened in it."""

    def __init__(
        self,
        browser: Browser,
        file: Path,
        size: tuple[int, int] = (1280, 900),
        *,
        scripts: bool = True,
        dark: bool = False,
    ) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["result"]["targetId"]
        self._target = target
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["result"]["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(*size)
        self.look("dark" if dark else "light")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.url = file.resolve().as_uri()
        self.call("Page.navigate", url=self.url)
        browser.wait(self._session, "Page.loadEventFired")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        result: dict[str, Any] = self._browser.call(method, self._session, **parameters)["result"]
        return result

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.run("new Promise(done => setTimeout(done, 50))")

    def look(self, theme: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, as a person presses it."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        text = {"text": "\r"} if key == "Enter" else {"text": " "} if key == " " else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **common, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, *, whole: bool = True) -> bytes:
        """A screenshot as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def events(self, method: str) -> list[dict[str, Any]]:
        self.run("0")  # what was under way has arrived
        mine = (e for e in self._browser.events if e.get("sessionId") == self._session)
        return [event["params"] for event in mine if event["method"] == method]

    @property
    def requests(self) -> list[str]:
        """Addresses that the page asked for, besides its own."""
        asked = [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]
        return [url for url in asked if url != self.url]

    @property
    def complaints(self) -> list[str]:
        """Errors, and whatever was written to the console."""
        found = [json.dumps(event) for event in self.events("Log.entryAdded")]
        found += [json.dumps(event) for event in self.events("Runtime.exceptionThrown")]
        return found + [json.dumps(event) for event in self.events("Runtime.consoleAPICalled")]

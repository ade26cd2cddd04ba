"""A headless Chromium driven over its DevTools protocol: enough to look at a page and press its buttons."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One page, open at `url`; a context manager."""

    def __init__(self, url: str, *, width: int = 900, height: int = 900) -> None:
        assert CHROMIUM is not None
        self._open = contextlib.ExitStack()
        self._profile = Path(self._open.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--window-size={width},{height}",
        ]
        command = [CHROMIUM, *flags, f"--user-data-dir={self._profile}", url]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._open.callback(self._end)
        self._socket = self._open.enter_context(connect(self._wait_for(self._target, 120), max_size=None))
        self._number = 0

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of an element."""
        box = f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
        x, y = self.evaluate(f"{box} return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def wait_until(self, script: str, timeout_s: float = 60) -> None:
        """Wait until the expression is true."""
        self._wait_for(lambda: self.evaluate(script), timeout_s)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _target(self) -> str | None:
        file = self._profile / "DevToolsActivePort"
        if not file.exists() or not (port := file.read_text().splitlines()[:1]):
            return None
        with urllib.request.urlopen(f"http://127.0.0.1:{port[0]}/json", timeout=60) as answer:
            pages = [target for target in json.load(answer) if target["type"] == "page"]
        return pages[0]["webSocketDebuggerUrl"] if pages else None

    def _call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=120))
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    @staticmethod
    def _wait_for(condition: Any, timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        while not (value := condition()):
            assert time.monotonic() < end, "the browser took too long"
            time.sleep(0.05)
        return value

"""A headless Chromium that tests drive through its DevTools protocol."""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian package), which .ci/run installs")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
           "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0",
           "--remote-allow-origins=*")  # fmt: skip


class Page:
    """One page of a browser."""

    def __init__(self, url: str) -> None:
        self.socket = websocket.create_connection(url, timeout=120)
        self.numbers = itertools.count(1)
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def size(self, width: int, height: int) -> None:
        """Make the window so large, in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, is_dark: bool = True) -> None:
        """Ask for dark or light pages."""
        value = "dark" if is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def open(self, url: str) -> None:
        """Load a page and wait until it is there."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        ends = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < ends, f"not true after {seconds} seconds: {expression}"
            time.sleep(0.1)

    def picture(self, path: Path) -> None:
        """Write a screenshot of the window as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page into a PDF file, on the paper that its style asks for."""
        printed = self.call("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(printed["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a new browser, whose profile lies in a folder."""
    assert CHROMIUM
    profile = folder / "profile"
    process = subprocess.Popen((CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "about:blank"),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        port_file, ends = profile / "DevToolsActivePort", time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < ends, "Chromium has not started"
            time.sleep(0.05)
        port, path = port_file.read_text().split()[:2]
        control = Page.__new__(Page)
        control.socket = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", timeout=120)
        control.numbers = itertools.count(1)
        (target,) = (t for t in control.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        page = Page(f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}")
        yield page
        page.socket.close()
        control.socket.close()
    finally:
        process.kill()
        process.wait()

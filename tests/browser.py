"""A real Chromium, driven over its debugging protocol: open, run JavaScript, take a picture."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a headless Chromium; a context manager that ends it."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
        ]
        options += [
            "--remote-allow-origins=*",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        options += [f"--window-size={width},{height}", "--hide-scrollbars"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([CHROMIUM, *options], **quiet)
        port = self._port(profile / "DevToolsActivePort")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            pages = [page for page in json.load(answer) if page["type"] == "page"]
        self.socket = websocket.create_connection(
            pages[0]["webSocketDebuggerUrl"], timeout=60
        )
        self.count = 0

    def _port(self, file: Path) -> str:
        for _ in range(600):
            if file.exists() and file.read_text().count("\n"):
                return file.read_text().splitlines()[0]
            time.sleep(0.1)
        raise TimeoutError("Chromium did not start within a minute")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, **parameters: object) -> dict:
        """One command of the protocol, answered."""
        self.count += 1
        command = {"id": self.count, "method": method, "params": parameters}
        self.socket.send(json.dumps(command))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                assert "error" not in message, message
                return message["result"]

    def open(self, page: Path) -> None:
        """Load a file and wait until it is complete."""
        self.call("Page.navigate", url=page.as_uri())
        wait = f"document.readyState == 'complete' && location.href.includes('{page.name}')"
        for _ in range(100):
            if self.run(wait):
                return
            time.sleep(0.1)
        raise TimeoutError(f"{page} did not load")

    def run(self, script: str) -> object:
        """The value of a JavaScript expression; an exception in it fails."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self, file: Path, width: int, height: int = 900) -> None:
        """A screenshot of the whole page at this width."""
        size = {
            "width": width,
            "height": height,
            "deviceScaleFactor": 1,
            "mobile": False,
        }
        self.call("Emulation.setDeviceMetricsOverride", **size)
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

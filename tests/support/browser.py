"""A headless Chromium that tests drive by its own protocol (DevTools): https://chromedevtools.github.io/devtools-protocol/."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
"""Where the browser is; None: there is none."""
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


class Page:
    """One page. Errors of its scripts, and what its policy has blocked, are in `errors`."""

    def __init__(self, connection: ClientConnection, session: str) -> None:
        self._connection = connection
        self._session = session
        self._number = 0
        self.errors: list[str] = []
        self.requested: list[str] = []
        """Addresses that it has asked for."""
        for domain in ("Page", "Runtime", "Log", "DOM", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command; its result."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": params, "sessionId": self._session}))
        while True:
            message = json.loads(self._connection.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, (method, message)
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif (
            message.get("method") == "Log.entryAdded"
            and params["entry"]["level"] == "error"
            and params["entry"]["source"] != "network"  # an answer with a status of an error
        ):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif message.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60) -> Any:
        """Wait until an expression is true; returns its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(condition)):
            assert time.monotonic() < until, f"{condition}: {self.errors} {self.run('document.body.innerText')}"
            time.sleep(0.1)
        return value

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)}) !== null")
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, selector: str, text: str) -> None:
        """Replace what is in a field, as a person would."""
        self.run(f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def spoken(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader finds."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node.get("role", {}).get("value", ""), node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]

    def picture(self, path: Path, dark: bool = False, width: int = 1100, most: int = 900) -> None:
        """A picture of the page, light or dark."""
        scheme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=most, deviceScaleFactor=1, mobile=False)
        height = min(most, int(self.run("document.body.scrollHeight")))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip)["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, whose files are in a folder."""
    assert PROGRAM
    command = [
        PROGRAM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with (folder / "browser.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until, found = time.monotonic() + 60, None
        while found is None:
            assert process.poll() is None and time.monotonic() < until, (folder / "browser.log").read_text()
            time.sleep(0.1)
            found = re.search(r"ws://\S+", (folder / "browser.log").read_text(errors="replace"))
        with connect(found[0], max_size=None, compression=None, proxy=None) as connection:

            def ask(number: int, method: str, **params: Any) -> dict[str, Any]:
                connection.send(json.dumps({"id": number, "method": method, "params": params}))
                while (message := json.loads(connection.recv(timeout=60))).get("id") != number:
                    pass
                return dict(message["result"])

            target = ask(10**6, "Target.createTarget", url="about:blank")["targetId"]
            yield Page(connection, ask(10**6 + 1, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)  # its own session
        process.wait()

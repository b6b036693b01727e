"""A headless Chromium that a test looks through: opens a page, waits for what shall stand there, clicks, takes pictures."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0")
"""Its own protocol listens on a port of loopback that it chooses."""
TIMEOUT_S = 90.0
"""A busy machine starts a browser slowly."""
program = shutil.which("chromium") or shutil.which("google-chrome")


class Page:
    """One tab. The browser's protocol is spoken on an event loop of this object's own."""

    def __init__(self, folder: Path, width: int, height: int) -> None:
        assert program is not None
        size = f"--window-size={width},{height}"
        self._process = subprocess.Popen(
            [program, *FLAGS, size, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._runner = asyncio.Runner()
        self._number = 0
        self._runner.run(self._connect(self._address()))

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The expression's value as soon as there is one that counts as true."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (value := self.ask(script)):
            assert time.monotonic() < deadline, f"waited for {script}; the page says {self.text()[:2000]}"
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """What can be read, in one line."""
        return " ".join(str(self.ask("document.body.innerText")).split())

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode={"Enter": 13}[key],
                text="\r",
            )

    def prefer_dark(self) -> None:
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    def picture(self, path: Path) -> None:
        """Kept in BATON_PICTURES instead, where that names a folder."""
        path = Path(os.environ.get("BATON_PICTURES", path.parent)) / path.name
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._runner.run(self._session.close())
        self._runner.close()
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stderr is not None
        self._process.stderr.close()

    def _address(self) -> str:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"ws://(\S+?)/", line):
                return found[1]
        raise AssertionError(f"Chromium ended with {self._process.wait()}")

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://{address}/json/list") as answer:
            (tab, *_) = [each for each in await answer.json() if each["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        return self._runner.run(asyncio.wait_for(self._ask(self._number, method, params), TIMEOUT_S))

    async def _ask(self, number: int, method: str, params: dict[str, Any]) -> Any:
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while (answer := await self._socket.receive_json()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]


@contextmanager
def browser(folder: Path, width: int = 1400, height: int = 3000) -> Iterator[Page]:
    page = Page(folder, width, height)
    try:
        yield page
    finally:
        page.close()

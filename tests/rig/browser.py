"""Headless Chromium, driven over its debugging socket: one tab."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CARD = "[...document.querySelectorAll('dl div')].find(d => d.querySelector('dt').textContent === {!r})"
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0")


class Browser:
    """One tab of headless Chromium, driven over its debugging socket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.complaints: list[str] = []

    async def send(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(60):
            while True:
                said = await self._socket.receive_json()
                if said.get("method") in {"Runtime.exceptionThrown", "Log.entryAdded"}:
                    self.complaints.append(json.dumps(said["params"]))
                if said.get("id") == number:
                    assert "error" not in said, said
                    return said["result"]

    async def value(self, expression: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def card(self, title: str) -> str:
        text: str = await self.value(f"{CARD.format(title)}.querySelector('dd').textContent.trim()")
        return text

    async def number(self, title: str) -> float:
        """-1: it is not known yet."""
        shown = await self.card(title)
        return -1.0 if shown.startswith("unknown") else float(shown.split()[0].replace(",", ""))

    async def shoot(self, path: Path, *, whole: bool = True) -> None:
        shot = await self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    async def look_like(self, width: int, height: int, *, dark: bool, scale: float = 1) -> None:
        """A screen of this size; below 500 pixels a phone's."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@asynccontextmanager
async def browsing(program: str, profile: Path) -> AsyncIterator[Browser]:
    """`profile`: a folder for the browser's files."""
    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        told = profile / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not told.exists() or not told.read_text().strip():
                assert process.poll() is None
                await asyncio.sleep(0.1)
        port = told.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                [tab] = [one for one in await answer.json() if one["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                made = Browser(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await made.send(f"{domain}.enable")
                await made.send("Emulation.setFocusEmulationEnabled", enabled=True)
                yield made
    finally:
        process.terminate()
        process.wait(30)

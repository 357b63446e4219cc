"""A real Chromium without a window, driven by its DevTools protocol over a WebSocket."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--force-color-profile=srgb",
)
_START = 30.0


class PageError(Exception):
    """The page's own script failed."""


class Page:
    """A tab. Errors and warnings of its console are kept in ``console``."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket
        self._next = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.create_task(self._read())
        self.console: list[str] = []

    async def _read(self) -> None:
        async for message in self._socket:
            if message.type is not WSMsgType.TEXT:
                break
            value = json.loads(message.data)
            if (answer := self._answers.pop(value.get("id", -1), None)) is not None:
                answer.set_result(value)
            elif value.get("method") == "Runtime.exceptionThrown":
                details = value["params"]["exceptionDetails"]
                self.console.append(details.get("exception", {}).get("description") or details["text"])
            elif value.get("method") == "Log.entryAdded" and value["params"]["entry"]["level"] == "error":
                entry = value["params"]["entry"]
                self.console.append(f"{entry['text']} {entry.get('url', '')}")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol."""
        self._next += 1
        answer = self._answers[self._next] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._next, "method": method, "params": parameters})
        value = await asyncio.wait_for(answer, 60)
        if "error" in value:
            raise PageError(f"{method}: {value['error']}")
        result: dict[str, Any] = value["result"]
        return result

    async def run(self, expression: str) -> Any:
        """What an expression of JavaScript gives, awaited."""
        result = await self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    async def until(self, expression: str, limit: float = 15.0) -> Any:
        """Wait until an expression is true, and give it."""
        end = time.monotonic() + limit
        while True:
            try:
                value = await self.run(
                    f"(() => {{ try {{ const v = ({expression}); return v instanceof Node ? true : v; }} "
                    "catch { return null; } })()"
                )
            except PageError as error:
                # The page that was asked is being left.
                if "navigated" not in str(error):
                    raise
                value = None
            if value:
                return value
            if time.monotonic() > end:
                text = await self.run("document.body.innerText")
                raise AssertionError(f"never true: {expression}\nconsole: {self.console}\n{text[:3000]}")
            await asyncio.sleep(0.03)

    async def open(self, url: str) -> None:
        """Go to a page and wait until it is there; from another address of the same page, too."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """The window's size in CSS pixels, and the colour scheme that it asks for."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = "dark" if dark else "light"
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )

    async def click(self, selector: str) -> None:
        """Click the first element that matches, once there is one that is shown."""
        found = json.dumps(selector)
        await self.until(f"document.querySelector({found})?.offsetParent !== undefined")
        await self.run(f"document.querySelector({found}).click()")

    async def write(self, selector: str, text: str) -> None:
        """Focus a field, empty it and type."""
        found = json.dumps(selector)
        await self.until(f"document.querySelector({found})")
        await self.run(f"(() => {{ const f = document.querySelector({found}); f.focus(); f.value = ''; }})()")
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, composing: bool = False) -> None:
        """Press a key where the focus is; ``composing``: as an input method reports it."""
        code = 229 if composing else {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}.get(key, 0)
        text = {"Enter": "\r"}.get(key, "") if not composing else ""
        down = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        width = await self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return int(width)

    async def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a PNG, of the whole page where ``full``."""
        result = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        data = base64.b64decode(result["data"])
        await asyncio.to_thread(path.write_bytes, data)

    async def close(self) -> None:
        """End listening."""
        await self._socket.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


class Browser:
    """Chromium at an address of its DevTools; `page` opens a new tab."""

    def __init__(self, address: str, session: ClientSession) -> None:
        self._address = address
        self._session = session

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """A fresh tab, closed at the end."""
        async with self._session.put(f"{self._address}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0, autoping=True)
        page = Page(socket)
        try:
            for domain in ("Page", "Runtime", "Log"):
                await page.call(f"{domain}.enable")
            yield page
        finally:
            async with self._session.get(f"{self._address}/json/close/{target['id']}"):
                pass
            await page.close()


@contextlib.contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[str]:
    """A running Chromium with a profile of its own in ``folder``; the address of its DevTools."""
    assert PROGRAM is not None
    quiet = subprocess.DEVNULL
    command = (PROGRAM, *_FLAGS, *flags, f"--user-data-dir={folder}", "about:blank")
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            yield f"http://127.0.0.1:{_port(folder / 'DevToolsActivePort')}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _port(file: Path) -> int:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(file.read_text().split("\n")[0])
        time.sleep(0.05)
    raise AssertionError(f"Chromium did not start within {_START:.0f} s")

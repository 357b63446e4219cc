"""Headless Chromium driven over its DevTools protocol."""

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
    """A script of the page failed."""


class Page:
    """A tab. ``console`` collects the errors and warnings of its console."""

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
        """Send a DevTools command and return its result."""
        self._next += 1
        answer = self._answers[self._next] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._next, "method": method, "params": parameters})
        value = await asyncio.wait_for(answer, 60)
        if "error" in value:
            raise PageError(f"{method}: {value['error']}")
        result: dict[str, Any] = value["result"]
        return result

    async def run(self, expression: str) -> Any:
        """Evaluate a JavaScript expression, await it, and return its value."""
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
        """Wait until an expression is truthy and return its value."""
        end = time.monotonic() + limit
        while True:
            try:
                value = await self.run(
                    f"(() => {{ try {{ const v = ({expression}); return v instanceof Node ? true : v; }} "
                    "catch { return null; } })()"
                )
            except PageError as error:
                # The page is being left.
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
        """Open a URL and wait until it is loaded, also if only its fragment differs from the current one."""
        await self.call("Page.navigate", url="about:blank")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Set the size of the window in CSS pixels and its preferred colour scheme."""
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
        """Wait for a visible element that matches, and click the first."""
        found = json.dumps(selector)
        await self.until(f"document.querySelector({found})?.offsetParent !== undefined")
        await self.run(f"document.querySelector({found}).click()")

    async def write(self, selector: str, text: str) -> None:
        """Focus a field, clear it and type ``text``."""
        found = json.dumps(selector)
        await self.until(f"document.querySelector({found})")
        await self.run(f"(() => {{ const f = document.querySelector({found}); f.focus(); f.value = ''; }})()")
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, composing: bool = False) -> None:
        """Press a key in the focused element. ``composing``: as reported by an input method."""
        code = 229 if composing else {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32}.get(key, 0)
        text = {"Enter": "\r"}.get(key, "") if not composing else ""
        down = {"key": key, "code": key, "windowsVirtualKeyCode": code, **({"text": text} if text else {})}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **down)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    async def overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        width = await self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return int(width)

    async def screenshot(self, path: Path, *, full: bool = True) -> None:
        """Write a PNG of the window, or of the whole page if ``full``."""
        result = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        data = base64.b64decode(result["data"])
        await asyncio.to_thread(path.write_bytes, data)

    async def close(self) -> None:
        """Stop reading events."""
        await self._socket.close()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)


class Browser:
    """Chromium at a DevTools address. `page` opens a new tab."""

    def __init__(self, address: str, session: ClientSession) -> None:
        self._address = address
        self._session = session

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """Yield a new tab and close it at the end."""
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
    """Run Chromium with a new profile in ``folder`` and yield its DevTools address."""
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

"""A web server of a test's own, on loopback: what stands in for somebody else's derives from it."""

from __future__ import annotations

import ssl

from aiohttp import web


class HttpDouble:
    """Serves an application until `close`."""

    _runner: web.AppRunner | None = None

    async def serve(self, app: web.Application, tls: ssl.SSLContext | None = None) -> str:
        """Begin to answer; the URL. What a caller hangs up on is cancelled."""
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls).start()
        return f"{'https' if tls else 'http'}://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """End it, and what is under way."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

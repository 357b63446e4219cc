"""Base class for HTTP servers on loopback that replace external services in tests."""

from __future__ import annotations

import ssl

from aiohttp import web


class HttpDouble:
    """Serves an application until `close`."""

    _runner: web.AppRunner | None = None

    async def serve(self, app: web.Application, tls: ssl.SSLContext | None = None) -> str:
        """Start the server. Returns its URL. A handler is cancelled when its client disconnects."""
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls).start()
        return f"{'https' if tls else 'http'}://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop the server and cancel active requests."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

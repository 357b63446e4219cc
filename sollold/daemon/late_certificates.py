"""Loads the system's CA certificates when a daemon first calls a web server, instead of at its start.

aiohttp loads them on import: about 140 certificates, 2.6 MB. Most daemons only call other nodes, which are
authenticated differently, and the machine's Ollama.
"""

from __future__ import annotations

import ssl
from typing import Any

from aiohttp import connector


class LateContext(ssl.SSLContext):
    """Like the result of `ssl.create_default_context`, but it loads the CA certificates at its first use."""

    _read = False

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """Load the certificates, then proceed as usual."""
        if not self._read:
            self._read = True
            self.load_default_certs()
        return super().wrap_bio(*args, **options)


def install() -> None:
    """Replace aiohttp's own context; call it before much else is imported.

    The memory of aiohttp's context is then freed, and reused by later imports.
    """
    original = getattr(connector, "_SSL_CONTEXT_VERIFIED", None)
    if not isinstance(original, ssl.SSLContext):
        return
    context = LateContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options, context.verify_flags = original.options, original.verify_flags
    context.set_alpn_protocols(["http/1.1"])
    connector._SSL_CONTEXT_VERIFIED = context

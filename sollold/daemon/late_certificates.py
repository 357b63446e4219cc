"""The system's certificates of authorities, read when a daemon first calls a web server, not at its start.

aiohttp reads them when it is imported: some 140 of them, 2.6 MB. Most daemons never call anything but their
neighbours, whom they know by other means, and a machine's Ollama.
"""

from __future__ import annotations

import ssl
from typing import Any

from aiohttp import connector


class LateContext(ssl.SSLContext):
    """As `ssl.create_default_context` makes one, but for the certificates, which its first use reads."""

    _read = False

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        """As always."""
        if not self._read:
            self._read = True
            self.load_default_certs()
        return super().wrap_bio(*args, **options)


def install() -> None:
    """Give aiohttp such a context instead of its own; to be called before much else is imported.

    What its own held is free then, and is taken by what comes after.
    """
    own = getattr(connector, "_SSL_CONTEXT_VERIFIED", None)
    if not isinstance(own, ssl.SSLContext):
        return
    late = LateContext(ssl.PROTOCOL_TLS_CLIENT)
    late.options, late.verify_flags = own.options, own.verify_flags
    late.set_alpn_protocols(["http/1.1"])
    connector._SSL_CONTEXT_VERIFIED = late

"""Certificate authorities that a client trusts: the system's, and those of clusters."""

from __future__ import annotations

import os
import ssl

from sollold.client.errors import ClientError

CA_VARIABLE = "SOLLOLD_CA"
"""Variable that names a file with additional CA certificates in PEM, as printed by ``sollold cluster ca``."""


def trusted(further: str = "") -> ssl.SSLContext:
    """A TLS context for connections to nodes. ``further``: additional CA certificates in PEM.

    Raises:
        ClientError: the file named by `CA_VARIABLE` is unreadable, or has no certificate.
    """
    context = ssl.create_default_context()
    if file := os.environ.get(CA_VARIABLE, ""):
        try:
            context.load_verify_locations(file)
        except OSError as error:
            why = error.strerror or error
            raise ClientError(f"{CA_VARIABLE}={file} has no authority that can be used: {why}", 400) from None
    if further:
        context.load_verify_locations(cadata=further)
    return context


def distrust(url: str, why: str) -> str:
    """Message that the certificate of ``url`` is not trusted."""
    return (
        f"the certificate of {url} is not trusted ({why}). If it is by the cluster's own authority: "
        f"`sollold cluster ca` on one of its nodes prints that; {CA_VARIABLE} names the file with it here"
    )

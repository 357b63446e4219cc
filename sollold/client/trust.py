"""Whose certificates a client believes: the system's authorities, and those of clusters."""

from __future__ import annotations

import os
import ssl

from sollold.client.errors import ClientError

CA_VARIABLE = "SOLLOLD_CA"
"""Names a file with further authorities in PEM, as ``sollold cluster ca`` prints that of a cluster."""


def trusted(further: str = "") -> ssl.SSLContext:
    """For connections to nodes. ``further``: authorities in PEM.

    Raises:
        ClientError: the file of `CA_VARIABLE` can't be read, or has no certificate.
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
    """For people: the certificate at ``url`` is not believed."""
    return (
        f"the certificate of {url} is not trusted ({why}). If it is by the cluster's own authority: "
        f"`sollold cluster ca` on one of its nodes prints that; {CA_VARIABLE} names the file with it here"
    )

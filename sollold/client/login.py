"""The login in a node's URL, for a proxy in front of it: ``https://USER:PASSWORD@HOST``.

It is sent with requests and never shown: messages and logs have the URL without it.
"""

from __future__ import annotations

import base64
from urllib.parse import unquote


def split_login(url: str) -> tuple[str, str]:
    """Split ``url`` into the URL without its login, and the header value for it; empty if it has none."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    login, sign, host = host.rpartition("@")
    header = "Basic " + base64.b64encode(unquote(login).encode()).decode() if sign else ""
    return f"{scheme}{mark}{host}{slash}{path}", header


def headers_of(login: str, key: str) -> dict[str, str]:
    """The headers for a login and an API key; if both are given, each has its own."""
    if not login:
        return {"Authorization": f"Bearer {key}"} if key else {}
    return {"Authorization": login, "X-Api-Key": key} if key else {"Authorization": login}


def login_wanted(url: str) -> str:
    """Message that a proxy in front of the node at ``url`` requires a login."""
    return f"a proxy at {url} asks for a login; it is given in the URL, as http://USER:PASSWORD@HOST"

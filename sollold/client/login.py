"""The login in the URL of a node, for a proxy before it that asks for one: ``https://USER:PASSWORD@HOST``.

It is sent and never told: what people read has the URL without it.
"""

from __future__ import annotations

import base64
from urllib.parse import unquote


def split_login(url: str) -> tuple[str, str]:
    """``url`` without its login, and the login as a header has it; empty: there is none."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    login, at, host = host.rpartition("@")
    shown = "Basic " + base64.b64encode(unquote(login).encode()).decode() if at else ""
    return f"{scheme}{mark}{host}{slash}{path}", shown


def headers_of(login: str, key: str) -> dict[str, str]:
    """The headers that show a login and an API key; where both are shown, each has its own."""
    if not login:
        return {"Authorization": f"Bearer {key}"} if key else {}
    return {"Authorization": login, "X-Api-Key": key} if key else {"Authorization": login}


def login_wanted(url: str) -> str:
    """Says that something before the node at ``url`` refused for want of a login."""
    return f"a proxy at {url} asks for a login; it is given in the URL, as http://USER:PASSWORD@HOST"

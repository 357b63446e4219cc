"""The proxy for requests to the internet, from ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``NO_PROXY``.

As in curl, a lower-case name takes precedence over an upper-case one. Requests to this machine never use a
proxy, and connections between nodes do not use this module at all.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from sollold.facts import dataclass

_PORTS = {"http": 80, "https": 443}


class BadProxy(ValueError):
    """The environment names a proxy that can't be used."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy. ``url`` includes its password; ``variable`` is the environment variable that set it."""

    url: str
    variable: str

    def __str__(self) -> str:
        """Return the URL without user and password, for people."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.variable})"


def proxy_for(url: str, environ: Mapping[str, str] | None = None) -> Proxy | None:
    """Return the proxy for a URL; None to connect directly.

    Raises:
        BadProxy: the configured proxy can't be used.
    """
    environ = os.environ if environ is None else environ
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    variable, value = _variable(environ, f"{parts.scheme}_proxy")
    if not value or _is_this_machine(host):
        return None
    try:
        port = parts.port
    except ValueError:
        port = None
    if excepted(host, port or _PORTS.get(parts.scheme, 0), _variable(environ, "no_proxy")[1]):
        return None
    return _proxy(value, variable)


def excepted(host: str, port: int, rules: str) -> bool:
    """Return whether a ``NO_PROXY`` list contains this host, its domain, its network, or ``*``."""
    return any(_matches(host.lower(), port, rule) for rule in re.split(r"[,\s]+", rules.lower()) if rule)


def _variable(environ: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the variable that is set and its value: an empty lower-case one turns the proxy off."""
    variable = name if name in environ else name.upper()
    return variable, environ.get(variable, "").strip()


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


def _matches(host: str, port: int, rule: str) -> bool:
    if rule == "*":
        return True
    if (address := _address(host)) is not None:
        try:
            return address in ipaddress.ip_network(rule.strip("[]"), strict=False)
        except ValueError:
            pass
    name, _, last = rule.rpartition(":")
    if name and last.isdigit():
        if int(last) != port:
            return False
        rule = name
    rule = rule.strip("[]").removeprefix("*").strip(".")
    return bool(rule) and (host == rule or host.endswith(f".{rule}"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _proxy(value: str, variable: str) -> Proxy:
    url = value if "://" in value else f"http://{value}"
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise BadProxy(f"{variable} is not a proxy's URL; write http://HOST:PORT")
    if parts.scheme not in ("http", "https"):
        raise BadProxy(
            f"{variable} names a {parts.scheme} proxy, which is not supported; "
            "use an HTTP proxy: http://HOST:PORT"
        )
    return Proxy(url, variable)

"""Shared by all commands that query a node: which node to ask, and how to print."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sollold.cli.exit import Exit
from sollold.cli.streams import harmless
from sollold.client.blocking import BlockingClient
from sollold.client.errors import ClientError
from sollold.settings.location import FILE_VARIABLE, HTTP_PORT, local_address, reachable

if TYPE_CHECKING:
    from rich.console import Console


_MAX_WIDTH = 100_000
"""Width of output that is not a terminal, in columns: lines for `grep` and `awk` are not wrapped."""


def named(options: argparse.Namespace) -> str:
    """The node named by ``--node`` or ``$SOLLOLD_NODE_URL``; empty for this machine's own."""
    return str(options.node or os.environ.get("SOLLOLD_NODE_URL", ""))


def here() -> tuple[str, int]:
    """Host and port of this machine's daemon, according to the settings.

    Raises:
        SettingsError: the file named by ``$SOLLOLD_CONFIG``, or a variable, is invalid.
    """
    if (found := local_address()) is not None:
        return found
    # Something is unusual: leave it to the full reader, which reports errors.
    from sollold.settings.fault import SettingsError
    from sollold.settings.load import load

    try:
        http = load(skip_unreadable=True).settings.http
    except SettingsError as error:
        if os.environ.get(FILE_VARIABLE):
            raise
        # The daemon still runs with the settings it read before, so commands and doctor can reach it.
        http = load(Path(os.devnull)).settings.http
        _warn_once(f"{error}; asking port {http.port}")
    return reachable(http.host), http.port


@cache
def _warn_once(text: str) -> None:
    print(f"sollold: {text}", file=sys.stderr)


def client(options: argparse.Namespace, *, timeout: float = 30.0) -> BlockingClient:
    """A client of the chosen node: ``--node``, ``$SOLLOLD_NODE_URL``, else this machine's daemon.

    Raises:
        ClientError: the name does not lead to a node.
    """
    key = os.environ.get("SOLLOLD_API_KEY", "")
    name = named(options)
    url = _url_of(name, key) if name else url_of(*here())
    return BlockingClient(
        url,
        timeout=timeout,
        key=key,
        credentials=partial(_member_pass, url) if name else None,
        authority=_own_authority if name else None,
        notice=_note,
    )


def _note(text: str) -> None:
    print(f"sollold: {harmless(text)}", file=sys.stderr)


def _member_pass(url: str) -> tuple[str, str]:
    """A pass that proves to the node at ``url`` that this machine is a member, and the authority of the
    cluster; empty if it is not one.

    It is sent only to addresses that this machine's daemon knows to be members.
    """
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ClientError):
        daemon = BlockingClient(url_of(*here()), timeout=5.0)
        answer = daemon.post("/api/cluster/pass", {"host": host})
        return str(answer["pass"]), str(answer.get("authority", ""))
    return "", ""


def _own_authority() -> str:
    """The authority of this machine's cluster; empty if it belongs to none."""
    with contextlib.suppress(ClientError):
        return BlockingClient(url_of(*here()), timeout=3.0).text("/api/cluster/ca")
    return ""


def url_of(host: str, port: int) -> str:
    """The URL of a node that listens at this host and port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _url_of(name: str, key: str) -> str:
    """The URL of the node named by ``name``: a URL, an address with or without a port, or a node's name.

    A bare word is looked up in the cluster first (that of ``$SOLLOLD_NODE_URL``, or this machine's), then by
    DNS.

    Raises:
        ClientError: several nodes have this name, or none, or they can't be asked.
    """
    if "://" in name:
        return name
    if name.count(":") > 1 and not name.startswith("["):
        return url_of(name, HTTP_PORT)  # an IPv6 address
    host, colon, port = name.rpartition(":")
    if colon and port.isdecimal():
        return f"http://{name}"
    host, message, status = name.strip("[]"), "", 0
    if "." not in host and host != "localhost":
        try:
            nodes = BlockingClient(_known_node(), timeout=3.0, key=key).get("/api/cluster")["nodes"]
        except ClientError as error:
            if not _is_host(host):
                message = f"no machine is named {name!r}, and the nodes' names are unknown: {error.message}"
        else:
            # By id first: a node's name may equal another node's id.
            found = [node for node in nodes if node["node"] == host.lower()] or [
                node for node in nodes if node["name"].lower() == host.lower()
            ]
            if len(found) == 1:
                return str(found[0]["url"])
            if found:
                ids = ", ".join(f"{node['node']} ({node['url']})" for node in found)
                message, status = f"several nodes are named {name!r}; name one by its id: {ids}", 400
            elif not _is_host(host):
                names = ", ".join(sorted(node["name"] for node in nodes))
                message = f"there is no node {name!r} and no machine of that name; nodes: {names}"
                status = 404
    if message:
        raise ClientError(message, status)
    return url_of(host, HTTP_PORT)


def _known_node() -> str:
    """The URL of a node that can be asked about the others."""
    url = os.environ.get("SOLLOLD_NODE_URL", "")
    return url if "://" in url else url_of(*here())


def _is_host(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, HTTP_PORT))
    except (OSError, UnicodeError):
        return False


def console(*, stderr: bool = False) -> Console:
    """The console for tables; if the output is not a terminal, without styles and never cut.

    Raises:
        BrokenPipeError: on printing, when the reader has gone.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Out(Console):
        def on_broken_pipe(self) -> None:
            raise  # as `print` does, instead of rich's own exit status

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else harmless(text), style, control)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width: int | None = None if terminal else _MAX_WIDTH
    height: int | None = None
    if terminal and os.environ.get("TERM") in ("dumb", "unknown"):
        # rich assumes 80 columns for any terminal of this kind.
        width, height = shutil.get_terminal_size()
    # Names come from other machines and from files: brackets and colons in them are not markup.
    return Out(stderr=stderr, highlight=False, markup=False, emoji=False, width=width, height=height)


def print_json(value: Any, *, line: bool = False) -> None:
    """Print ``value`` as JSON: indented, or with ``line`` on one line that is flushed at once.

    Unless the output's encoding is UTF-8, characters other than ASCII are escaped.
    """
    plain = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
    print(json.dumps(value, indent=None if line else 2, ensure_ascii=plain), flush=line)


def print_result(options: argparse.Namespace, answer: Any, *lines: str) -> Exit:
    """Print the node's answer as JSON if ``--json`` was given, else ``lines``. Returns the exit status."""
    if options.json:
        print_json(answer)
    else:
        print(harmless("\n".join(lines)))
    return Exit.DONE

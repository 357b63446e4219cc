"""What all asking commands share: which node they ask, and how they print."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sollold.cli.streams import harmless
from sollold.client.http import Client
from sollold.config import HttpSettings
from sollold.settings import load

if TYPE_CHECKING:
    from rich.console import Console


_UNCUT = 100_000
"""Columns of an output that is no terminal: what `grep` and `awk` read is not broken into lines."""


def named(options: argparse.Namespace) -> str:
    """The node that ``--node`` or ``$SOLLOLD_NODE_URL`` names; empty: this machine's is meant."""
    return str(options.node or os.environ.get("SOLLOLD_NODE_URL", ""))


def here(http: HttpSettings) -> tuple[str, int]:
    """Where this machine's daemon is reached when it listens as ``http`` says."""
    loopback = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
    return loopback.get(http.host, http.host), http.port


def client(options: argparse.Namespace, *, timeout: float = 30.0) -> Client:
    """A client of the node that is meant: ``--node``, ``$SOLLOLD_NODE_URL``, else this machine's daemon."""
    url = named(options)
    if not url:
        host, port = here(load(skip_unreadable=True).settings.http)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if "://" not in url:
        url = f"http://{url}"
    return Client(url, timeout=timeout)


def console(*, stderr: bool = False) -> Console:
    """Where tables go; plain when the output is no terminal, and never cut there.

    Raises:
        BrokenPipeError: when it prints, and nobody reads.
    """
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Out(Console):
        def on_broken_pipe(self) -> None:
            raise  # as `print` does, not an end with a status of its own

        def render(
            self, renderable: RenderableType, options: ConsoleOptions | None = None
        ) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else harmless(text), style, control)

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    # Names come from other machines and from files: brackets and colons in them are no markup.
    return Out(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if terminal else _UNCUT)


def print_json(item: Any) -> None:
    """One JSON document, indented, for programs; what the output's encoding may not have is escaped."""
    plain = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
    print(json.dumps(item, indent=2, ensure_ascii=plain))

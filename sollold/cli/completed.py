"""Which command lists the possible values of an argument, for all shells' completion scripts."""

from __future__ import annotations

import argparse

from sollold.cli.parser import ALIASES

_BY_WORD = {"MODEL": "sollold models --quiet", "NODE": "sollold nodes --quiet"}
"""Listing command by the argument's placeholder in help."""
_BY_ARGUMENT = {
    ("forget", "name"): "sollold nodes --quiet --offline",
    ("admit", "name"): "sollold nodes --quiet --waiting",
    ("unload", "model"): "sollold ps --quiet",
    ("logs", "model"): "sollold ps --quiet",
    ("key", "name"): "sollold key list --quiet",
}
"""Listing command by (command, argument), where only some models or nodes are valid."""
_SUBCOMMANDS = {("key", "name"): "revoke", ("cluster", "argument"): "evict"}
"""Subcommand after which values are completed; after others, a new name or a duration follows."""


def lister(command: str, action: argparse.Action) -> str:
    """The command that prints the possible values, one per line; empty if there are none to list."""
    listing = _BY_ARGUMENT.get((ALIASES.get(command, command), action.dest))
    return listing or _BY_WORD.get(str(action.metavar), "")


def needed_before(command: str, action: argparse.Action) -> str:
    """The subcommand that must precede `lister`'s values; empty if none."""
    return _SUBCOMMANDS.get((command, action.dest), "")

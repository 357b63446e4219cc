"""Which command lists what may stand for an argument: for the completion scripts of all shells."""

from __future__ import annotations

import argparse

from sollold.cli.parser import ALIASES

_BY_WORD = {"MODEL": "sollold models --quiet", "NODE": "sollold nodes --quiet"}
"""By the word that stands for it in help."""
_BY_PLACE = {
    ("forget", "name"): "sollold nodes --quiet --offline",
    ("admit", "name"): "sollold nodes --quiet --waiting",
    ("unload", "model"): "sollold ps --quiet",
    ("logs", "model"): "sollold ps --quiet",
    ("key", "name"): "sollold key list --quiet",
}
"""By command and argument, where not all models or nodes may stand."""
_AFTER = {("key", "name"): "revoke", ("cluster", "argument"): "evict"}
"""The word that must stand before: a new key has a new name, and a door opens for a time."""


def lister(command: str, action: argparse.Action) -> str:
    """The command that prints the words, one a line; empty where the daemon knows none."""
    known = _BY_PLACE.get((ALIASES.get(command, command), action.dest))
    return known or _BY_WORD.get(str(action.metavar), "")


def needed_before(command: str, action: argparse.Action) -> str:
    """The word without which `lister`'s words do not stand there; empty: none."""
    return _AFTER.get((command, action.dest), "")

"""The completion script for fish, generated from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from sollold.cli.completed import lister, needed_before
from sollold.cli.parser import parser, subcommands


def fish_script() -> str:
    """The script: one `complete` command per possible word."""
    top = parser()
    helps = {
        choice.dest: choice.help or ""
        for action in top._actions
        if isinstance(action, argparse._SubParsersAction)
        for choice in action._choices_actions
    }
    lines = ["complete -c sollold -f"]
    for action in top._actions:
        if action.option_strings:
            lines += _lines_for("", action, "__fish_use_subcommand")
    for name, sub in subcommands(top).items():
        # An alias has its command's description, which is a sentence.
        description = (sub.description or "").rstrip(".")
        summary = helps.get(name) or description[:1].lower() + description[1:]
        lines.append(f"complete -c sollold -n __fish_use_subcommand -a {name} -d {_quoted(summary)}")
        for action in sub._actions:
            lines += _lines_for(name, action, f"__fish_seen_subcommand_from {name}")
    return "\n".join(lines) + "\n"


def _lines_for(command: str, action: argparse.Action, condition: str) -> Iterator[str]:
    if action.help == argparse.SUPPRESS:
        return
    listing = lister(command, action)
    words = f"(timeout 3 {listing} 2>/dev/null)" if listing else ""
    if subcommand := needed_before(command, action):
        condition += f"; and __fish_seen_subcommand_from {subcommand}"
    if not words and action.choices is not None:
        words = " ".join(str(choice) for choice in action.choices if choice)
    begin = f"complete -c sollold -n {_quoted(condition)}"
    if not action.option_strings:
        if words:
            yield f"{begin} -a {_quoted(words)}"
        return
    flags = " ".join(
        f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in action.option_strings
    )
    argument = "" if action.nargs == 0 else f" -x -a {_quoted(words)}" if words else " -r"
    yield f"{begin} {flags}{argument} -d {_quoted(action.help or '')}"


def _quoted(text: str) -> str:
    text = text.replace("%%", "%").replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"

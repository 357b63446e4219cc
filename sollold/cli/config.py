"""``sollold config``: the effective settings."""

from __future__ import annotations

import argparse

import msgspec

from sollold.cli.exit import Exit
from sollold.settings.document import example, in_force, values_in_force
from sollold.settings.fault import SettingsError
from sollold.settings.load import LoadedSettings, load


def loaded(options: argparse.Namespace, *, skip_unreadable: bool = False) -> LoadedSettings:
    """The settings from ``--config``, ``--set`` and the environment; ``skip_unreadable`` as in `load`.

    Raises:
        SettingsError: as `load`.
    """
    flags = []
    for text in options.set:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingsError(f"--set {text}: write --set SECTION.KEY=VALUE, such as --set http.port=8080")
        flags.append((key.strip(), value.strip(), f"--set {text}"))
    return load(options.config, flags=flags, skip_unreadable=skip_unreadable)


def config(options: argparse.Namespace) -> int:
    """Print every setting, its value and its source."""
    # Not at the top: the daemon imports `loaded` too, and does not need the client.
    from sollold.cli.asking import console, print_json

    if options.example:
        print(example(), end="")
        return Exit.DONE
    found = loaded(options)
    if options.check:
        return Exit.DONE
    if options.json:
        shown = {key: {"value": value, "from": origin} for key, value, origin in values_in_force(found)}
        print_json(msgspec.to_builtins(shown))
        return Exit.DONE
    from sollold.cli.fitting import Fitting

    table = Fitting(("setting", "value", "from"), whole=("setting",), spare=("from",))
    for key, value, origin in in_force(found):
        style = "" if origin != "default" else "dim"
        table.add_row(key, value, origin, style=style)
    out = console()
    out.print(table)
    out.print(f"\nfile: {found.file or 'none; /etc/sollold/sollold.toml would be read'}", style="dim")
    out.print(
        "These settings apply to a daemon started from here; a running one keeps those it started with.",
        style="dim",
    )
    return Exit.DONE

"""Renders the settings as a commented TOML file and as a table, from the classes themselves.

The docstring of each field in `sollold.settings.schema` is its only documentation.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
from operator import attrgetter
from pathlib import Path
from typing import Any

from sollold.settings import schema
from sollold.settings.catalogue import SECRETS, Setting, catalogue
from sollold.settings.confidential import HIDDEN, hidden_in
from sollold.settings.live import LIVE_KEYS
from sollold.settings.load import LoadedSettings
from sollold.settings.schema import Bytes, Settings


@functools.cache
def documentation() -> dict[str, str]:
    """Return the text for each key (``section.name``) and for each section (``section``)."""
    tree = ast.parse(Path(inspect.getfile(schema)).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    found: dict[str, str] = {}
    for section, part in ((name, getattr(Settings(), name)) for name in Settings.__slots__):
        node = classes[type(part).__name__]
        summary = (ast.get_docstring(node) or "").partition(": ")[2]
        found[section] = summary[:1].upper() + summary[1:]
        previous = ""
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                previous = statement.target.id
            elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and previous:
                found[f"{section}.{previous}"] = inspect.cleandoc(str(statement.value.value)).replace(
                    "``", ""
                )
                previous = ""
    return found


def toml_value(setting: Setting, value: object) -> str:
    """Format a value for the file; sizes with a unit if that is exact."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(json.dumps(item, ensure_ascii=False) for item in value) + "]"
    if isinstance(value, dict):
        if not value:
            return "{}"
        pairs = (f"{json.dumps(name)} = {_item(item)}" for name, item in value.items())
        return "{ " + ", ".join(pairs) + " }"
    if setting.kind is Bytes and isinstance(value, int) and value:
        for unit, size in (("GiB", schema.GIB), ("MiB", schema.MIB)):
            if value % size == 0:
                return f'"{value // size} {unit}"'
    return json.dumps(value, ensure_ascii=False)


def _item(value: object) -> str:
    """Format a value within a table."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = (f"{field.name} = {_item(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value, ensure_ascii=False)


def example() -> str:
    """Return the example file installed in ``/etc``: every key commented out, with its default."""
    texts = documentation()
    lines = [
        "# Settings of sollold. Every key is shown with its default; all are optional.",
        '# Sizes: bytes, or a string with a unit ("20 GiB"). Durations: seconds, or "5m", "1h30m".',
        "# Each key can also be set by the environment: [http] port is SOLLOLD_HTTP_PORT.",
        "# `sollold config` prints the values in use and where each comes from.",
        "# After a change: `systemctl reload sollold`. Keys marked (restart) need a restart.",
    ]
    section = ""
    for key, setting in catalogue().items():
        if setting.section != section:
            section = setting.section
            lines += ["", f"[{section}]", f"# {texts[section]}"]
        lines.append("")
        lines += [f"# {line}" for line in texts.get(key, "").splitlines()]
        lines += [] if key in LIVE_KEYS else ["# (restart)"]
        lines.append(f"#{setting.name} = {toml_value(setting, setting.default)}")
    return "\n".join(lines) + "\n"


def in_force(loaded: LoadedSettings) -> list[tuple[str, str, str]]:
    """Return (key, formatted value, origin) of every setting, with secrets redacted."""
    settings = catalogue()
    return [
        (key, value if _is_hidden(loaded, key) else toml_value(settings[key], value), origin)
        for key, value, origin in values_in_force(loaded)
    ]


def values_in_force(loaded: LoadedSettings) -> list[tuple[str, Any, str]]:
    """Return (key, value, origin) of every setting, with secrets redacted."""
    rows = []
    for key in catalogue():
        value = attrgetter(key)(loaded.settings)
        redacted = hidden_in(value)
        origin = loaded.origins.get(key, "default")
        if redacted != value and origin.startswith("--"):
            origin = f"{origin.partition('=')[0]}={HIDDEN}"
        rows.append((key, "(set)" if _is_hidden(loaded, key) else redacted, origin))
    return rows


def _is_hidden(loaded: LoadedSettings, key: str) -> bool:
    return key in SECRETS and bool(attrgetter(key)(loaded.settings))

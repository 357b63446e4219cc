"""Loads the settings: defaults, then one TOML file, then ``SOLLOLD_*``, then flags.

An invalid key or value is rejected with its location and the closest valid one. The origin of each value is
remembered, so that ``sollold config`` can show it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import stat
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.settings.catalogue import FOREIGN_VARIABLES, SECRETS, Setting, catalogue, nearest
from sollold.settings.convert import convert, from_text
from sollold.settings.fault import SettingsError
from sollold.settings.location import FILE_VARIABLE, candidates
from sollold.settings.read_file import read_file
from sollold.settings.schema import Settings

_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*(?:=|\.)""")
_TABLE = re.compile(r"\s*\[\s*([A-Za-z0-9_.\"-]+)\s*\]")


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The effective settings, and the origin of each key that is not a default."""

    settings: Settings
    origins: Mapping[str, str]
    file: Path | None


def load(
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Sequence[tuple[str, str, str]] = (),
    *,
    skip_unreadable: bool = False,
) -> LoadedSettings:
    """Load the settings. Blocks: call it before the loop runs, or in a thread.

    Args:
        file: the TOML file; None: the one that ``$SOLLOLD_CONFIG`` names, else the first of `candidates`
            that exists, else none.
        environment: environment variables; None: the process's.
        flags: (key, value as text, the flag as typed); the last one wins.
        skip_unreadable: skip those of `candidates` that this user may not read, for commands that only
            query a daemon: the file may contain the cluster's token.

    Raises:
        SettingsError: a file is unreadable, or is world-readable although it contains a secret; a key or
            value is invalid.
    """
    variables = os.environ if environment is None else environment
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    if file is None and variables.get(FILE_VARIABLE):
        file = Path(variables[FILE_VARIABLE])
    if file is None:
        file = _find_file(skip_unreadable)
    if file is not None:
        for key, value, place in _from_file(file):
            values[key], origins[key] = value, place
        if not skip_unreadable:
            _refuse_open_secrets(file, values)
    for key, setting in catalogue().items():
        for variable in (FOREIGN_VARIABLES.get(key, ""), setting.variable):
            if text := variables.get(variable, ""):
                values[key], origins[key] = from_text(setting, text, variable), variable
    _refuse_unknown_variables(variables)
    for key, text, spelled in flags:
        spelled = spelled.replace(text, "…") if key in SECRETS and text else spelled
        setting = _setting(key, spelled)
        values[key], origins[key] = from_text(setting, text, spelled), spelled
    return LoadedSettings(_with_values(Settings(), values), origins, file)


def _find_file(skip_unreadable: bool) -> Path | None:
    for place in candidates():
        try:
            if not place.is_file():
                continue
        except OSError as error:  # its folder can't be searched
            if skip_unreadable:
                continue
            raise SettingsError(f"{place}: can't be read: {system_reason(error)}{_hint(error)}") from error
        if not (skip_unreadable and not os.access(place, os.R_OK)):
            return place
    return None


def _hint(error: OSError) -> str:
    """Return advice about an unreadable file."""
    if not isinstance(error, PermissionError):
        return ""
    return "; it may hold the cluster's secret: try with sudo, or name a file of your own with --config"


def _from_file(file: Path) -> Iterator[tuple[str, object, str]]:
    try:
        # Editors on Windows may write a byte order mark.
        text = read_file(file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"{file}: can't be read: it is not in UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{file}: can't be read: {system_reason(error)}{_hint(error)}") from error
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Besides invalid TOML: numbers that are too long for Python, and lists that are nested too deeply.
        raise SettingsError(f"{file}: not TOML: {error}") from error
    lines = _lines(text)
    sections = [field.name for field in dataclasses.fields(Settings)]
    for section, table in document.items():
        place = f"{file}:{lines.get(section, 1)}"
        if section not in sections:
            if not isinstance(table, dict):
                raise SettingsError(f"{place}: {section} is in no section{_sections_of(section)}")
            raise SettingsError(f"{place}: unknown section [{section}]{nearest(section, sections)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{place}: {section} is a section: write [{section}] and its keys below")
        for name, value in table.items():
            key = f"{section}.{name}"
            place = f"{file}:{lines.get(key, lines.get(section, 1))}"
            setting = _setting(key, place)
            yield key, convert(setting, value, place), place


def _sections_of(name: str) -> str:
    """Return advice about a key written before the first section."""
    owners = [f"[{setting.section}]" for setting in catalogue().values() if setting.name == name]
    return f": write it below {' or '.join(owners)}" if owners else ", and no section has such a key"


def _refuse_open_secrets(file: Path, values: Mapping[str, object]) -> None:
    """Reject a file that contains a secret but is readable by every user of the machine.

    Raises:
        SettingsError: it is one; the message has the command that fixes it.
    """
    secrets = [key for key in SECRETS if values.get(key) not in ("", "open", (), None)]
    if not secrets:
        return
    try:
        mode, folder = file.stat().st_mode, file.resolve().parent.stat().st_mode
    except OSError:
        return
    if stat.S_ISREG(mode) and mode & stat.S_IROTH and folder & stat.S_IXOTH:
        command = f"chmod o-rwx {shlex.quote(str(file))}"
        raise SettingsError(
            f"{file}: {secrets[0]} is a secret, but every user of this machine can read it; run: {command}"
        )


def _lines(text: str) -> dict[str, int]:
    """Return the line numbers of tables (``section``) and of their keys (``section.key``)."""
    found: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            table = header[1].replace('"', "")
            parts = table.split(".")
            for depth in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[:depth]), number)
        elif key := _KEY.match(line):
            name = key[1] or key[2] or key[3]
            found.setdefault(f"{table}.{name}" if table else name, number)
    return found


def _refuse_unknown_variables(variables: Mapping[str, str]) -> None:
    known = [setting.variable for setting in catalogue().values()]
    extra = {FILE_VARIABLE, "SOLLOLD_NODE_URL", "SOLLOLD_API_KEY", "SOLLOLD_CA"}
    # Package builds and tests have variables of their own.
    prefixes = ("SOLLOLD_DEB_", "SOLLOLD_TEST_")
    for name in variables:
        if name.startswith("SOLLOLD_") and name not in {*known, *extra} and not name.startswith(prefixes):
            raise SettingsError(f"{name}: unknown setting{nearest(name, known)}")


def _setting(key: str, place: str) -> Setting:
    known = catalogue()
    if key in known:
        return known[key]
    section, _, name = key.partition(".")
    hint = nearest(name, [item.name for item in known.values() if item.section == section])
    if not hint:
        matches = [item.key for item in known.values() if item.name == name]
        hint = f"; did you mean {matches[0]}?" if matches else nearest(key, known)
    raise SettingsError(f"{place}: unknown setting {key}{hint}")


def merged(old: Settings, new: Settings, keys: Collection[str]) -> Settings:
    """Return ``old`` with the values of ``keys`` from ``new``."""
    return _with_values(old, {key: attrgetter(key)(new) for key in keys})


def differences(old: Settings, new: Settings) -> list[str]:
    """Return the keys whose values differ, in the order of the file."""
    return [key for key in catalogue() if attrgetter(key)(old) != attrgetter(key)(new)]


def _with_values(settings: Settings, values: Mapping[str, object]) -> Settings:
    """Return ``settings`` with other values of some keys."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return dataclasses.replace(
        settings,
        **{name: dataclasses.replace(getattr(settings, name), **part) for name, part in sections.items()},
    )

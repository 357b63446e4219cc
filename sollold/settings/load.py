"""Loads the settings: defaults, then one TOML file, then ``SOLLOLD_*``, then flags.

An invalid key or value is rejected with its location and the closest valid one. The origin of each value is
remembered, so that ``sollold config`` can show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import math
import os
import re
import shlex
import stat
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from sollold.did_you_mean import did_you_mean
from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.settings.fault import SettingsError
from sollold.settings.location import FILE_VARIABLE, candidates
from sollold.settings.read_file import read_file
from sollold.settings.schema import Settings
from sollold.settings.wrong_value import in_words
from sollold.units import parse_bytes, parse_seconds

_KEY = re.compile(r"""\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*(?:=|\.)""")
_nearest = functools.partial(did_you_mean, alike=0.5)
_TABLE = re.compile(r"\s*\[\s*([A-Za-z0-9_.\"-]+)\s*\]")


SECRETS = ("cluster.token", "cluster.old_tokens")
"""Keys whose values are never shown."""
FOREIGN_VARIABLES = {"llama.rpc_backends": "RPC_BACKENDS"}
"""Variables that other programs use for the same purpose; our own take precedence."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A settings key: its name, type annotation and default."""

    section: str
    name: str
    kind: object
    default: object

    @property
    def key(self) -> str:
        """``section.name``."""
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Environment variable that sets it."""
        return f"SOLLOLD_{self.section}_{self.name}".upper()


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """The effective settings, and the origin of each key that is not a default."""

    settings: Settings
    origins: Mapping[str, str]
    file: Path | None


@functools.cache
def catalogue() -> dict[str, Setting]:
    """Return all settings by key."""
    found: dict[str, Setting] = {}
    for section in dataclasses.fields(Settings):
        kinds = typing.get_type_hints(typing.get_type_hints(Settings)[section.name], include_extras=True)
        for name, default in _fields(getattr(Settings(), section.name)):
            setting = Setting(section.name, name, kinds[name], default)
            found[setting.key] = setting
    return found


def _fields(part: object) -> Iterator[tuple[str, object]]:
    for item in dataclasses.fields(part):  # type: ignore[arg-type]
        yield item.name, getattr(part, item.name)


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
                values[key], origins[key] = _from_text(setting, text, variable), variable
    _refuse_unknown_variables(variables)
    for key, text, spelled in flags:
        spelled = spelled.replace(text, "…") if key in SECRETS and text else spelled
        setting = _setting(key, spelled)
        values[key], origins[key] = _from_text(setting, text, spelled), spelled
    sections: dict[str, dict[str, object]] = {}
    for key, value in values.items():
        setting = catalogue()[key]
        sections.setdefault(setting.section, {})[setting.name] = value
    settings = Settings(
        **{  # type: ignore[arg-type]
            name: dataclasses.replace(part, **sections.get(name, {}))  # type: ignore[type-var]
            for name, part in _fields(Settings())
        }
    )
    return LoadedSettings(settings, origins, file)


def _find_file(skip_unreadable: bool) -> Path | None:
    for place in candidates():
        try:
            if not place.is_file():
                continue
        except PermissionError as error:  # its folder is not accessible
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
            raise SettingsError(f"{place}: unknown section [{section}]{_nearest(section, sections)}")
        if not isinstance(table, dict):
            raise SettingsError(f"{place}: {section} is a section: write [{section}] and its keys below")
        for name, value in table.items():
            key = f"{section}.{name}"
            place = f"{file}:{lines.get(key, lines.get(section, 1))}"
            setting = _setting(key, place)
            yield key, _convert(setting, value, place), place


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
            raise SettingsError(f"{name}: unknown setting{_nearest(name, known)}")


def _setting(key: str, place: str) -> Setting:
    known = catalogue()
    if key in known:
        return known[key]
    section, _, name = key.partition(".")
    hint = _nearest(name, [item.name for item in known.values() if item.section == section])
    if not hint:
        matches = [item.key for item in known.values() if item.name == name]
        hint = f"; did you mean {matches[0]}?" if matches else _nearest(key, known)
    raise SettingsError(f"{place}: unknown setting {key}{hint}")


def _from_text(setting: Setting, text: str, place: str) -> object:
    """Parse a value from an environment variable or a flag: lists with commas, tables as ``k=v,k=v``, or
    either in TOML syntax."""
    bare = _base_type(setting.kind)
    is_list, is_table = typing.get_origin(bare) is tuple, typing.get_origin(bare) is dict
    if (is_list and text.lstrip().startswith("[")) or (is_table and text.lstrip().startswith("{")):
        with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
            return _convert(setting, tomllib.loads(f"value = {text}")["value"], place)
    if bare is bool:
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False}
        if text.lower() not in words:
            raise SettingsError(f"{place}: {setting.key} must be true or false, not {text!r}")
        return words[text.lower()]
    if is_list:
        return _convert(setting, [part.strip() for part in text.split(",") if part.strip()], place)
    if is_table:
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not sign for _, sign, _ in pairs):
            raise SettingsError(f"{place}: {setting.key} must be written name=value,name=value")
        return _convert(setting, {name.strip(): value.strip() for name, _, value in pairs}, place)
    if bare in (int, float) and not _unit(setting.kind):
        try:
            return _convert(setting, bare(text), place)
        except ValueError:
            raise SettingsError(f"{place}: {setting.key} must be a number, not {text!r}") from None
    return _convert(setting, text, place)


def _base_type(kind: object) -> typing.Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _convert(setting: Setting, value: object, place: str) -> object:
    kind = setting.kind
    try:
        if _unit(kind):
            value = _parse_unit(kind, value)
        elif typing.get_origin(kind) is dict and isinstance(value, dict):
            item = typing.get_args(kind)[1]
            if _unit(item):
                value = {name: _parse_unit(item, part) for name, part in value.items()}
            elif dataclasses.is_dataclass(item) and isinstance(item, type):
                value = {name: _entry(item, name, part) for name, part in value.items()}
        converted: object = msgspec.convert(_match_choice(kind, value), kind)
        if isinstance(converted, float) and not math.isfinite(converted):
            raise ValueError(f"{converted} is not a usable number")
        if isinstance(converted, tuple) and typing.get_args(kind):
            _check_networks(typing.get_args(kind)[0], converted)
        return converted
    except (msgspec.ValidationError, ValueError) as error:
        text = str(error)
        choices = (
            typing.get_args(_base_type(kind)) if typing.get_origin(_base_type(kind)) is typing.Literal else ()
        )
        if choices:
            words = [str(choice) or '""' for choice in choices]
            text = f"{value!r} is not one of {', '.join(words)}{_nearest(str(value), words)}"
        elif "matching regex" in text:
            shown = "the given value" if setting.key in SECRETS else repr(value)
            text = f"{shown} is not {_description(kind)}"
        else:
            text = in_words(text, value, secret=setting.key in SECRETS)
        raise SettingsError(f"{place}: {setting.key}: {text}") from None


def _match_choice(kind: object, value: object) -> object:
    """Match a choice regardless of case and surrounding spaces; other values are unchanged."""
    choices = (
        typing.get_args(_base_type(kind)) if typing.get_origin(_base_type(kind)) is typing.Literal else ()
    )
    return next((word for word in choices if isinstance(value, str) and word == value.strip().lower()), value)


def _check_networks(kind: object, texts: tuple[object, ...]) -> None:
    """Raise ValueError if ``kind`` is a list of networks and one of ``texts`` is not a network."""
    if any(meta.title == "network" for meta in _metas(kind)):
        for text in texts:
            try:
                ipaddress.ip_network(str(text), strict=False)
            except ValueError:
                raise ValueError(f"{text!r} is not {_description(kind)}") from None


def _entry(kind: type, name: str, value: object) -> dict[str, object]:
    """Convert one table in a table of tables, turning its sizes into numbers.

    Raises:
        ValueError: it is not a table, or has an unknown key.
    """
    kinds = typing.get_type_hints(kind, include_extras=True)
    if not isinstance(value, dict):
        raise ValueError(f"{name!r} is a table with the keys {', '.join(kinds)}; write it in the file")
    for key in value:
        if key not in kinds:
            raise ValueError(f"{name!r} has no key {key}{_nearest(key, kinds)}")
    return {key: _parse_unit(kinds[key], part) for key, part in value.items()}


def _parse_unit(kind: object, value: object) -> object:
    if isinstance(value, str):
        return parse_bytes(value) if _unit(kind) == "bytes" else parse_seconds(value)
    return value


def _metas(kind: object) -> list[msgspec.Meta]:
    return [meta for meta in typing.get_args(kind) if isinstance(meta, msgspec.Meta)]


def _unit(kind: object) -> str:
    """Return ``bytes`` or ``seconds`` for types written with a unit; else an empty string."""
    return next((meta.title for meta in _metas(kind) if meta.title in ("bytes", "seconds")), None) or ""


def _description(kind: object) -> str:
    """Return the description of the expected form of a string type (or of a list of such strings)."""
    kinds = [kind, *typing.get_args(kind)]
    return next((meta.description for t in kinds for meta in _metas(t) if meta.description), None) or ""


def merged(old: Settings, new: Settings, keys: Collection[str]) -> Settings:
    """Return ``old`` with the values of ``keys`` from ``new``."""
    sections: dict[str, dict[str, object]] = {}
    for key in keys:
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = getattr(getattr(new, section), name)
    return dataclasses.replace(
        old,
        **{name: dataclasses.replace(getattr(old, name), **values) for name, values in sections.items()},
    )


def differences(old: Settings, new: Settings) -> list[str]:
    """Return the keys whose values differ, in the order of the file."""
    changed = []
    for key, setting in catalogue().items():
        old_value = getattr(getattr(old, setting.section), setting.name)
        new_value = getattr(getattr(new, setting.section), setting.name)
        if old_value != new_value:
            changed.append(key)
    return changed

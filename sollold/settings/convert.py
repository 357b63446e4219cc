"""Converts the values of settings from text and from TOML, and checks them."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import math
import tomllib
import typing

import msgspec

from sollold.settings.catalogue import SECRETS, Setting, nearest
from sollold.settings.fault import SettingsError
from sollold.settings.wrong_value import in_words
from sollold.units import parse_bytes, parse_seconds


def from_text(setting: Setting, text: str, place: str) -> object:
    """Parse a value from an environment variable or a flag: lists with commas, tables as ``k=v,k=v``, or
    either in TOML syntax."""
    bare = _base_type(setting.kind)
    is_list, is_table = typing.get_origin(bare) is tuple, typing.get_origin(bare) is dict
    if (is_list and text.lstrip().startswith("[")) or (is_table and text.lstrip().startswith("{")):
        with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
            return convert(setting, tomllib.loads(f"value = {text}")["value"], place)
    if bare is bool:
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False}
        if text.lower() not in words:
            raise SettingsError(f"{place}: {setting.key} must be true or false, not {text!r}")
        return words[text.lower()]
    if is_list:
        return convert(setting, [part.strip() for part in text.split(",") if part.strip()], place)
    if is_table:
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        if any(not sign for _, sign, _ in pairs):
            raise SettingsError(f"{place}: {setting.key} must be written name=value,name=value")
        return convert(setting, {name.strip(): value.strip() for name, _, value in pairs}, place)
    if bare in (int, float) and not _unit(setting.kind):
        try:
            return convert(setting, bare(text), place)
        except ValueError:
            raise SettingsError(f"{place}: {setting.key} must be a number, not {text!r}") from None
    return convert(setting, text, place)


def _base_type(kind: object) -> typing.Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def convert(setting: Setting, value: object, place: str) -> object:
    """Convert a value from TOML to the setting's type; ``place``: where it is written.

    Raises:
        SettingsError: it is invalid; the message says why.
    """
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
        choices = _choices(kind)
        if choices:
            words = [str(choice) or '""' for choice in choices]
            text = f"{value!r} is not one of {', '.join(words)}{nearest(str(value), words)}"
        elif "matching regex" in text:
            shown = "the given value" if setting.key in SECRETS else repr(value)
            text = f"{shown} is not {_description(kind)}"
        else:
            text = in_words(text, value, secret=setting.key in SECRETS)
        raise SettingsError(f"{place}: {setting.key}: {text}") from None


def _choices(kind: object) -> tuple[str, ...]:
    bare = _base_type(kind)
    return typing.get_args(bare) if typing.get_origin(bare) is typing.Literal else ()


def _match_choice(kind: object, value: object) -> object:
    """Match a choice regardless of case and surrounding spaces; other values are unchanged."""
    text = value.strip().lower() if isinstance(value, str) else None
    return text if text in _choices(kind) else value


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
            raise ValueError(f"{name!r} has no key {key}{nearest(key, kinds)}")
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

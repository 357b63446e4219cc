"""Parsing and formatting of byte counts, durations and timestamps."""

from __future__ import annotations

import datetime
import math
import re

_SIZES = {
    "": 1,
    "b": 1,
    "k": 1024,
    "kib": 1024,
    "kb": 1000,
    "m": 1024**2,
    "mib": 1024**2,
    "mb": 1000**2,
    "g": 1024**3,
    "gib": 1024**3,
    "gb": 1000**3,
    "t": 1024**4,
    "tib": 1024**4,
    "tb": 1000**4,
}
_MAX_SIZE = 2.0**62
"""Largest accepted size, in bytes: sizes must fit in 64 bits on the wire."""
_MAX_CHARACTERS = 1000
"""Maximum length of a number with its unit, in characters: a megabyte of digits would take long to parse."""
_BINARY = ("KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_SPANS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DAY = 86400.0
NEVER = "0001-01-01T00:00:00Z"
"""The zero time, as Ollama writes it."""
_SPAN_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h|d)")
_SPAN = re.compile(rf"[-+]?(?:{_SPAN_PART.pattern})+")


def _check_length(text: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise ValueError(f"{text[:20]!r}… is too long for a number")


def parse_bytes(text: str) -> int:
    """Parse a size: ``20 GiB``, ``400MB``, ``1.5g`` (a bare K, M, G, T is binary) or a plain number of bytes.

    Raises:
        ValueError: ``text`` is not a size.
    """
    _check_length(text)
    match = _SIZE.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _SIZES:
        raise ValueError(f"{text!r} is not a size; write bytes or a unit, such as 20 GiB or 400 MB")
    size = float(match[1]) * _SIZES[unit]
    if size > _MAX_SIZE:
        raise ValueError(f"{text!r} is too large")
    return int(size)


def parse_seconds(text: str) -> float:
    """Parse a plain number of seconds or a duration in Go's format: ``5m``, ``1h30m``, ``250ms``, ``-1``.

    Raises:
        ValueError: ``text`` is not a duration.
    """
    _check_length(text)
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        if not _SPAN.fullmatch(text):
            raise ValueError(
                f"{text!r} is not a duration; write seconds or a unit, such as 90, 5m or 1h30m"
            ) from None
        seconds = sum(float(number) * _SPANS[unit] for number, unit in _SPAN_PART.findall(text))
        seconds = -seconds if text.startswith("-") else seconds
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is not a duration")
    return seconds


def bytes_text(count: float) -> str:
    """Format bytes with three digits: ``1536`` → ``1.50 KiB``."""
    sign, size = "-" if count < 0 else "", abs(float(count))
    if size < 1024:
        return f"{sign}{size:.0f} B"
    power = min(int(math.log(size, 1024)), len(_BINARY))
    size /= 1024**power
    digits = 0 if size >= 100 else 1 if size >= 10 else 2
    return f"{sign}{size:.{digits}f} {_BINARY[power - 1]}"


def seconds_text(seconds: float) -> str:
    """``95.2`` → ``1 min 35 s``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} d {hours % 24} h"


def file_time_text(seconds: float) -> str:
    """Format a file's modification time like `timestamp_text`; `NEVER` where it is not known.

    Tools for reproducible archives set a time of 0 or 1 on the files in them.
    """
    return timestamp_text(seconds) if seconds > _DAY else NEVER


def timestamp_text(seconds: float) -> str:
    """Format seconds since the epoch as RFC 3339 in UTC; times out of range become the epoch."""
    try:
        moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (OverflowError, OSError, ValueError):
        moment = datetime.datetime.fromtimestamp(0, datetime.UTC)
    return moment.isoformat().replace("+00:00", "Z")

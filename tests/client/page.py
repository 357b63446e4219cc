"""The examples of docs/python.md: its code, and what it says they print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
MARK = "<<< example {} >>>"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """One block of code; ``printed`` is None where the page does not say what comes of it."""

    code: str
    printed: str | None


def examples(page: Path = PAGE) -> list[Example]:
    """All of them, in order."""
    found: list[Example] = []
    for kind, text in _BLOCK.findall(page.read_text()):
        if kind == "python":
            found.append(Example(text, None))
        elif kind == "text" and found and found[-1].printed is None:
            found[-1] = Example(found[-1].code, text)
    return found


def program(found: list[Example]) -> str:
    """One program of them all, which marks where each one's output begins."""
    parts = []
    for number, one in enumerate(found):
        parts += [f"print({MARK.format(number)!r}, flush=True)\n", one.code, "\n"]
    return "".join(parts)


def outputs(printed: str, count: int) -> list[str]:
    """What each example printed."""
    parts = []
    rest = printed
    for number in range(count):
        _, _, rest = rest.partition(MARK.format(number) + "\n")
        parts.append(rest.partition(MARK.format(number + 1) + "\n")[0])
    return parts


def plain(text: str) -> str:
    """Without what differs from run to run: addresses, sizes, and which machines take which layers."""
    text = re.sub(r"\d+\.\d+\.\d+\.\d+:11435", "ADDRESS", text)
    text = re.sub(r"\b(anna|bert|cleo)\b", "NODE", text)
    return re.sub(r"\d+ MiB|layers \d+ to \d+", "#", text)

"""The examples of docs/python.md with their documented output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
MARK = "<<< example {} >>>"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """One block of code. ``printed`` is None if the page shows no output for it."""

    code: str
    printed: str | None


def examples(page: Path = PAGE) -> list[Example]:
    """Return all examples in order."""
    found: list[Example] = []
    for kind, text in _BLOCK.findall(page.read_text()):
        if kind == "python":
            found.append(Example(text, None))
        elif kind == "text" and found and found[-1].printed is None:
            found[-1] = Example(found[-1].code, text)
    return found


def program(found: list[Example]) -> str:
    """Join the examples into one program that marks the beginning of each output."""
    parts = []
    for number, example in enumerate(found):
        parts += [f"print({MARK.format(number)!r}, flush=True)\n", example.code, "\n"]
    return "".join(parts)


def outputs(printed: str, count: int) -> list[str]:
    """Split the program's output into that of each example."""
    parts = []
    rest = printed
    for number in range(count):
        _, _, rest = rest.partition(MARK.format(number) + "\n")
        parts.append(rest.partition(MARK.format(number + 1) + "\n")[0])
    return parts


def plain(text: str) -> str:
    """Mask what differs between runs: addresses, sizes, and the placement of layers."""
    text = re.sub(r"\d+\.\d+\.\d+\.\d+:11435", "ADDRESS", text)
    text = re.sub(r"\b(anna|bert|cleo)\b", "NODE", text)
    return re.sub(r"\d+ MiB|layers \d+ to \d+", "#", text)

"""Prints what people read, with its place: `python -m tests.words [FOLDER…]`.

Collected by reading the syntax trees: help, output, errors, log messages, refusals, findings, settings'
descriptions. Docstrings, names of JSON fields and other words between programs are left out.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERS = ("systemd/*", "packaging/*.md", "packaging/deb/debian/*", "sollold/api/web/*", "Makefile")
"""Files that people read too, or that hold what they read, and are no Python."""
_SENTENCE = re.compile(r"[A-Za-z…'{}]+[,;:]? [A-Za-z…'{}(`]+")
"""Two words in a row: what programs say to each other has none."""


@dataclass(frozen=True, slots=True)
class Words:
    """A text that somebody reads."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


class _Reader(ast.NodeVisitor):
    """Collects the texts of one module; what is formatted in stands as ``{expression}``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.found: list[Words] = []

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # else a docstring
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._keep(node, "".join(self._part(one) for one in node.values))
        for one in node.values:  # texts within what is formatted in
            if isinstance(one, ast.FormattedValue):
                self.visit(one.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self._keep(node, node.value)

    def _keep(self, node: ast.expr, text: str) -> None:
        if _SENTENCE.search(text):
            self.found.append(Words(self._file, node.lineno, " ".join(text.split())))

    def _part(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return f"{{{ast.unparse(node.value)}}}" if isinstance(node, ast.FormattedValue) else ""


def words(folders: list[Path]) -> Iterator[Words]:
    """All texts of the modules below ``folders``, by file and line."""
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            reader = _Reader(file)
            reader.visit(ast.parse(file.read_text(encoding="utf-8")))
            yield from reader.found


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(description="what people read, with its place")
    parser.add_argument("folder", type=Path, nargs="*", default=[ROOT / "sollold"])
    parser.add_argument("--files", action="store_true", help="also list the other files that people read")
    chosen = parser.parse_args()
    for one in words([folder.resolve() for folder in chosen.folder]):
        print(one)
    if chosen.files:
        for pattern in OTHERS:
            for file in sorted(ROOT.glob(pattern)):
                print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()

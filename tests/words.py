"""Print all user-visible texts with file and line: `python -m tests.words [FOLDER…]`.

The texts are taken from the syntax trees: help, output, errors, log messages, findings, descriptions of
settings. Docstrings, names of JSON fields and other strings exchanged between programs are excluded.
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
"""Files with user-visible texts that are not Python."""
_SENTENCE = re.compile(r"[A-Za-z…'{}]+[,;:]? [A-Za-z…'{}(`]+")
"""Two consecutive words, which strings exchanged between programs don't contain."""


@dataclass(frozen=True, slots=True)
class Words:
    """A user-visible text and its location."""

    file: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


class _Reader(ast.NodeVisitor):
    """Collects the texts of one module. Values of f-strings are shown as ``{expression}``."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.found: list[Words] = []

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # else a docstring
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        self._keep(node, "".join(self._part(value) for value in node.values))
        for value in node.values:  # texts within the formatted expressions
            if isinstance(value, ast.FormattedValue):
                self.visit(value.value)

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
    """The texts of all modules below ``folders``, in order of file and line."""
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            reader = _Reader(file)
            reader.visit(ast.parse(file.read_text(encoding="utf-8")))
            yield from reader.found


def main() -> None:
    """Print the list."""
    parser = argparse.ArgumentParser(description="print all user-visible texts with file and line")
    parser.add_argument("folder", type=Path, nargs="*", default=[ROOT / "sollold"])
    parser.add_argument("--files", action="store_true", help="also list other files with user-visible texts")
    arguments = parser.parse_args()
    for text in words([folder.resolve() for folder in arguments.folder]):
        print(text)
    if arguments.files:
        for pattern in OTHERS:
            for file in sorted(ROOT.glob(pattern)):
                print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()

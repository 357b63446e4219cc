"""The content of a GGUF file's header: metadata and the table of tensors."""

from __future__ import annotations

from dataclasses import field

from sollold.facts import dataclass


class GgufError(Exception):
    """A file is not a usable GGUF file.

    Attributes:
        path: the file.
        offset: position of the error, in bytes; 0 when it concerns the file as a whole.
        reason: what is wrong, without path and offset.
    """

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: {reason} (at byte {offset})")
        self.path = path
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Array:
    """A metadata array: its length, and its values unless there were too many to keep.

    For skipped values: ``span``: their start and end in the first file, in bytes; ``scalar``: the `struct`
    format of their type, empty for strings.
    """

    length: int
    values: tuple[str | int | float | bool, ...] | None
    span: tuple[int, int] = field(default=(0, 0), compare=False)
    scalar: str = field(default="", compare=False)


Value = str | int | float | bool | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as listed in the table.

    ``shape``: innermost dimension first, at least one. ``type``: ggml's type number. ``size``: in bytes.
    ``offset``: absolute, in ``files[file]`` of the header.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    size: int
    offset: int
    file: int = 0

    @property
    def elements(self) -> int:
        """Number of weights."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one model, from its file or files. ``size``: total size of the files, in bytes."""

    files: tuple[str, ...]
    size: int
    version: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...] = field(repr=False)

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty if missing."""
        return self.text("general.architecture")

    def text(self, key: str, default: str = "") -> str:
        """Return a string from the metadata, or the default if it is missing or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else default

    def integer(self, key: str, default: int = 0) -> int:
        """Return an integer from the metadata, or the default if it is missing or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def length(self, key: str) -> int:
        """Return the length of a metadata array; 0 if there is none."""
        value = self.metadata.get(key)
        return value.length if isinstance(value, Array) else 0

    def integers(self, key: str) -> tuple[int, ...]:
        """Return an array of integers or booleans; a single integer is an array of one.

        Empty if there is none, or if its values were not kept.
        """
        value = self.metadata.get(key)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, Array) and value.values is not None:
            return tuple(item for item in value.values if isinstance(item, int))
        return ()

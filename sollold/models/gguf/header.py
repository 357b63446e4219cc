"""What the header of a GGUF file says: metadata and the table of tensors."""

from __future__ import annotations

from dataclasses import field

from sollold.facts import dataclass


class GgufError(Exception):
    """A file that is no GGUF file that can be used, and where in it that shows.

    Attributes:
        path: the file.
        offset: byte at which it was seen; 0 when it concerns the file as a whole.
        reason: what is wrong, without path and offset.
    """

    def __init__(self, path: str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: {reason} (at byte {offset})")
        self.path = path
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata: its length, and its values unless there were too many to keep.

    Of values that were stepped over: ``span``: the bytes from and up to which they lie in the first file;
    ``scalar``: how `struct` calls their type; empty: they are texts.
    """

    length: int
    values: tuple[str | int | float | bool, ...] | None
    span: tuple[int, int] = field(default=(0, 0), compare=False)
    scalar: str = field(default="", compare=False)


Value = str | int | float | bool | Array


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the table lists it.

    ``shape``: innermost dimension first, at least one. ``type``: ggml's number. ``size``: bytes.
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
        """Count of weights."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True, slots=True)
class Header:
    """What one model's file or files say of it. ``size``: bytes of all files."""

    files: tuple[str, ...]
    size: int
    version: int
    metadata: dict[str, Value]
    tensors: tuple[Tensor, ...] = field(repr=False)

    @property
    def architecture(self) -> str:
        """``general.architecture``; empty when it is not said."""
        return self.text("general.architecture")

    def text(self, key: str, default: str = "") -> str:
        """A string of the metadata; the default when it is missing or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else default

    def integer(self, key: str, default: int = 0) -> int:
        """An integer of the metadata; the default when it is missing or of another type."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def length(self, key: str) -> int:
        """The length of an array of the metadata; 0 when there is none."""
        value = self.metadata.get(key)
        return value.length if isinstance(value, Array) else 0

    def integers(self, key: str) -> tuple[int, ...]:
        """An array of integers or booleans, or one integer as an array of one; empty when there is none."""
        value = self.metadata.get(key)
        if isinstance(value, int):
            return (value,)
        if isinstance(value, Array) and value.values is not None:
            return tuple(item for item in value.values if isinstance(item, int))
        return ()

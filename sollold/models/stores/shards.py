"""Groups the GGUF files of one folder: shards into one model, projectors with their models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sollold.facts import dataclass
from sollold.models.names import canonical, of_file
from sollold.models.stores.scan_result import FoundModel

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_PROJECTOR = re.compile(r"(^|[-._])mmproj([-._]|$)", re.IGNORECASE)
_PROJECTOR_ORDER = ("f16", "bf16", "f32", "q8_0")


@dataclass(frozen=True, slots=True)
class ShardedFile:
    """One model's files. ``stem``: without shard number and suffix; ``missing``: missing shard numbers."""

    stem: str
    files: tuple[Path, ...]
    projector: Path | None = None
    missing: tuple[int, ...] = ()
    count: int = 1

    @property
    def fault(self) -> str:
        """Why the model can't be run, as a sentence; empty if all shards are there."""
        if not self.missing:
            return ""
        numbers = ", ".join(map(str, self.missing[:8])) + (" …" if len(self.missing) > 8 else "")
        noun, verb, pronoun = ("Shard", "is", "it") if len(self.missing) == 1 else ("Shards", "are", "them")
        problem = f"{noun} {numbers} of {self.count} {verb} missing beside {self.files[0]}"
        return f"{problem}. Download {pronoun} into that folder."

    def found(self, name: str, source: str) -> FoundModel:
        """Return the model as a store lists it; the file name replaces an invalid ``name``."""
        try:
            name = canonical(name)
        except ValueError:
            name = f"{of_file(self.stem)[0][:80]}:latest"
        return FoundModel(
            name,
            source,
            files=tuple(map(str, self.files)),
            projector=str(self.projector or ""),
            unusable=self.fault,
        )


def is_projector(name: str) -> bool:
    """Return whether a file's name marks it as a multimodal projector."""
    return bool(_PROJECTOR.search(name.removesuffix(".gguf")))


def group(paths: Iterable[Path]) -> list[ShardedFile]:
    """Group the GGUF files of one folder. The files are not opened."""
    singles: list[Path] = []
    projectors: list[Path] = []
    sharded: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(paths):
        if is_projector(path.name):
            projectors.append(path)
        elif match := _SHARD.fullmatch(path.name):
            shards = sharded.setdefault((match["stem"], int(match["count"])), {})
            shards[int(match["number"])] = path
        else:
            singles.append(path)
    groups = [ShardedFile(path.name[: -len(path.suffix)], (path,)) for path in singles]
    for (stem, count), shards in sharded.items():
        # An absurd count would make a list of millions of missing numbers.
        missing = tuple(k for k in range(1, min(count, 9999) + 1) if k not in shards)
        files = tuple(shards[number] for number in sorted(shards))
        groups.append(ShardedFile(stem, files, missing=missing, count=count))
    bases = {of_file(found.stem)[0].lower() for found in groups}
    return [
        ShardedFile(
            found.stem, found.files, _projector(found.stem, projectors, bases), found.missing, found.count
        )
        for found in groups
    ]


def _projector(stem: str, projectors: list[Path], bases: set[str]) -> Path | None:
    """Return the projector whose name contains the model's, or any if the folder has one model only."""
    base = of_file(stem)[0].lower()
    matching = [path for path in projectors if base in path.name.lower()]
    fitting = matching or (projectors if len(bases) == 1 else [])
    return min(fitting, key=_preference, default=None)


def _preference(path: Path) -> tuple[int, str]:
    name = path.name.lower()
    ranks = [rank for rank, kind in enumerate(_PROJECTOR_ORDER) if re.search(rf"(?<![a-z0-9]){kind}", name)]
    return (ranks[0] if ranks else len(_PROJECTOR_ORDER), name)

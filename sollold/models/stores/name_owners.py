"""Which content a name belongs to on this node, kept over restarts: who had a name first keeps it.

Pure but for `read` and `write`, which block.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.models.model import Model
from sollold.models.names import LONGEST, of_file, parse
from sollold.models.stores.safe_read import UNDECODABLE
from sollold.models.stores.scan_result import Problem
from sollold.settings.state_file import write_whole

log = logging.getLogger("sollold.models")


class NameOwners:
    """Name (its letters small) → digest of the content, and since when, in seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: dict[str, tuple[str, float]] = {}

    def read(self) -> None:
        """What an earlier run knew; nothing when there is none, or it is damaged."""
        try:
            self._owners = msgspec.json.decode(self._path.read_bytes(), type=dict[str, tuple[str, float]])
        except (OSError, *UNDECODABLE):
            self._owners = {}

    def write(self) -> None:
        """Keep it for the next run; a disk that refuses costs no more than the order of names."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, msgspec.json.encode(self._owners))
        except OSError as error:
            log.info("can't keep in %s whose the models' names are: %s", self._path, error)

    def assign(
        self, models: Iterable[Model], now: float, *, settled: bool
    ) -> tuple[tuple[Model, ...], tuple[Problem, ...], bool]:
        """The models under names of which no two are equal, what is to be told of that, and whether `write`
        is due.

        ``models``: those whose names go first at the beginning. ``settled``: all places were looked at; while
        they are not, a name is kept for its owner though that is not there.
        """
        named: dict[str, list[Model]] = {}
        for model in models:
            named.setdefault(model.name.lower(), []).append(model)
        before = dict(self._owners)
        taken: dict[str, Model] = {}
        late: list[Model] = []
        for key, contents in named.items():
            owner = self._owner(key, contents, now, settled=settled)
            for model in contents:
                if model.digest == owner:
                    taken.setdefault(key, replace(model, since=self._owners.get(key, ("", 0.0))[1]))
                else:
                    late.append(model)
        if settled:
            self._owners = {key: value for key, value in self._owners.items() if key in named}
        problems = []
        for model in late:
            keeper = taken.get(model.name.lower())
            name = next((one for one in distinct_names(model, keeper) if one.lower() not in taken), "")
            if not name or any(one.digest == model.digest for one in taken.values() if one.name == name):
                continue
            taken[name.lower()] = replace(model, name=name)
            if keeper is not None and model.files and keeper.files:
                what = f"{model.name} is {keeper.files[0]}; {model.files[0]} has other content and is {name}"
                problems.append(Problem(f"{what}.", "rename one of the files"))
        return tuple(taken.values()), tuple(problems), self._owners != before

    def _owner(self, key: str, contents: list[Model], now: float, *, settled: bool) -> str:
        """The digest of the content that has the name."""
        digest, _ = self._owners.get(key, ("", 0.0))
        usable = [model for model in contents if not model.unusable]
        if digest and (not settled or any(model.digest == digest for model in contents)):
            return digest
        # What can't be read just now may be the owner, with another digest.
        if digest and not usable:
            return contents[0].digest
        first = (usable or contents)[0]
        if not first.unusable:
            self._owners[key] = (first.digest, now)
        return first.digest


def distinct_names(model: Model, keeper: Model | None) -> tuple[str, ...]:
    """Names for a model whose own belongs to other content, the best first.

    The folder's name tells it from the ``keeper`` of the name, where it is in another; else the beginning of
    the digest.
    """
    names = []
    if model.source in ("folder", "llama.cpp") and model.files:
        folder = Path(model.files[0]).parent.name
        theirs = Path(keeper.files[0]).parent.name if keeper is not None and keeper.files else ""
        if folder.lower() != theirs.lower():
            names.append(_with_ending(model.name, of_file(folder)[0][:40]))
    return (*names, apart(model.name, model.digest))


def apart(name: str, digest: str) -> str:
    """A name for a model whose own name belongs to other content: the digest's beginning in the tag."""
    return _with_ending(name, digest[:8])


def _with_ending(name: str, ending: str) -> str:
    parsed = parse(name)
    tag = parsed.tag[: max(1, LONGEST - len(name) + len(parsed.tag) - len(ending) - 1)]
    return str(replace(parsed, tag=f"{tag}-{ending}"))

"""Decides which content a name belongs to on this node, across restarts: the first to have it keeps it.

Pure except for `read` and `write`, which block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sollold.models.model import Model
from sollold.models.names import LONGEST, of_file, parse
from sollold.models.stores.scan_result import Problem
from sollold.settings.state_file import read_json, save_json

_FIRST_TIME = 1_577_836_800.0
"""The year 2020, in Unix time: a clock that shows less was not set yet."""


class NameOwners:
    """Lower-case name → digest of the content, and since when, in seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owners: dict[str, tuple[str, float]] = {}

    def read(self) -> None:
        """Read the owners stored by an earlier run; none if the file is missing or damaged."""
        self._owners = read_json(self._path, dict[str, tuple[str, float]]) or {}

    def write(self) -> None:
        """Store the owners for the next run; if that fails, only the precedence of names is lost."""
        save_json(self._path, self._owners)

    def assign(
        self, models: Iterable[Model], now: float, *, settled: bool, reading: bool
    ) -> tuple[tuple[Model, ...], tuple[Problem, ...], bool]:
        """Give each model a unique name.

        ``models``: in order of precedence for names without an owner. ``settled``: all stores have been
        scanned; before that, the owner of a name is kept even if it is missing, and while stores are being
        scanned for the first time (``reading``) no other content has the name.

        Returns:
            the models under unique names, the problems to report, and whether `write` is due.
        """
        named: dict[str, list[Model]] = {}
        for model in models:
            named.setdefault(model.name.lower(), []).append(model)
        previous = dict(self._owners)
        taken: dict[str, Model] = {}
        unnamed: list[Model] = []
        for key, contents in named.items():
            owner = self._owner(key, contents, now, settled=settled, reading=reading)
            digest, since = self._owners.get(key, ("", 0.0))
            if digest:
                since = _plausible(since, now)
                self._owners[key] = digest, since
            for model in contents:
                if model.digest != owner:
                    unnamed.append(model)
                elif key not in taken or (taken[key].unusable and not model.unusable):
                    taken[key] = replace(model, since=since if digest == owner else 0.0)
        if settled:
            self._owners = {key: value for key, value in self._owners.items() if key in named}
        problems = []
        for model in unnamed:
            keeper = taken.get(model.name.lower())
            name = next((new for new in distinct_names(model, keeper) if new.lower() not in taken), "")
            if not name or any(m.digest == model.digest for m in taken.values() if m.name == name):
                continue
            taken[name.lower()] = replace(model, name=name)
            if keeper is not None and model.files and keeper.files:
                conflict = f"{model.name} is {keeper.files[0]}; {model.files[0]} has different content"
                problems.append(Problem(f"{conflict} and is listed as {name}.", "rename one of the files"))
        return tuple(taken.values()), tuple(problems), self._owners != previous

    def _owner(self, key: str, contents: list[Model], now: float, *, settled: bool, reading: bool) -> str:
        """Return the digest of the content that has the name now.

        While its owner can't be used, such as on a share that does not answer, usable content has it.
        """
        digest, _ = self._owners.get(key, ("", 0.0))
        usable = [model for model in contents if not model.unusable]
        owned = [model for model in contents if model.digest == digest]
        if digest and (owned or not settled):
            lost = not reading and all(model.unusable for model in owned)
            return usable[0].digest if lost and usable else digest
        # The owner may be a file that can't be read now, and so has another digest.
        if digest and not usable:
            return contents[0].digest
        first = (usable or contents)[0]
        if not first.unusable:
            self._owners[key] = first.digest, now
        return first.digest


def _plausible(since: float, now: float) -> float:
    """Return a time that may be compared with those of other nodes; 0.0, unknown, before the clock is set.

    A machine without a battery begins in 1970. Its content would otherwise take the names of all others.
    """
    return next((time for time in (since, now) if time >= _FIRST_TIME), 0.0)


def distinct_names(model: Model, keeper: Model | None) -> tuple[str, ...]:
    """Return alternative names for a model whose name belongs to other content, the best first.

    Its folder's name distinguishes it from the ``keeper`` of the name if that is in another folder; otherwise
    the beginning of the digest does.
    """
    names = []
    if model.source in ("folder", "llama.cpp") and model.files:
        folder = Path(model.files[0]).parent.name
        keeper_folder = Path(keeper.files[0]).parent.name if keeper is not None and keeper.files else ""
        if folder.lower() != keeper_folder.lower():
            names.append(_with_suffix(model.name, of_file(folder)[0][:40]))
    return (*names, name_with_digest(model.name, model.digest))


def name_with_digest(name: str, digest: str) -> str:
    """Return an alternative name for a model whose name is taken: the digest's beginning in the tag."""
    return _with_suffix(name, digest[:8])


def _with_suffix(name: str, suffix: str) -> str:
    parsed = parse(name)
    tag = parsed.tag[: max(1, LONGEST - len(name) + len(parsed.tag) - len(suffix) - 1)]
    return str(replace(parsed, tag=f"{tag}-{suffix}"))

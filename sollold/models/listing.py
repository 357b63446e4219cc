"""Merges all nodes' models into one list: each with its name, its nodes and its names in Ollama. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field, fields, replace
from operator import attrgetter, is_

from sollold.cluster.gossip.record import InOllama
from sollold.facts import dataclass
from sollold.models.model import Model
from sollold.models.stores.name_owners import distinct_names
from sollold.models.templates.jinja import fingerprint, untranslatable


@dataclass(frozen=True, slots=True)
class Listed:
    """A model of the cluster, the ids of the nodes that have its content, and its names in Ollama."""

    model: Model
    nodes: tuple[str, ...]
    in_ollama: InOllama = field(default_factory=InOllama)


_Pairs = tuple[tuple[str, Model], ...]
"""(node, model), by node."""
_List = tuple[tuple[Model, ...], tuple[Model, ...]]
"""A node's list, and the same with objects of its earlier lists for equal models."""
_Made = tuple[list[object], Listed, _Pairs]
"""What an entry was made from, the entry, and its nodes."""


class Merger:
    """Merges the lists of all nodes whenever one has changed.

    The event loop waits for it, and a cluster may list thousands of models. So what was made of models that
    are equal to those of the last lists is kept.
    """

    def __init__(self) -> None:
        self._lists: dict[str, _List] = {}
        self._made: dict[str, _Made] = {}
        """By lower-case name, of names with one content."""

    def merge(self, lists: Mapping[str, tuple[Model, ...]]) -> tuple[dict[str, Listed], dict[str, _Pairs]]:
        """Return name → model with its nodes, and name → (node, model) pairs.

        Content is identified by digest, so a node that has it under another name counts too, and a model that
        one node knows only by Ollama's manifest is the same as the one another node can read. If several
        contents have the same name, it stays with runnable content, then with the content that has had the
        name longest, then with the one on the most nodes, then with the newest. The others get their folder's
        name, or the digest, into the tag.
        """
        self._lists = {node: _kept(self._lists.get(node, ((), ())), lists[node]) for node in sorted(lists)}
        in_ollama, held, named = _grouped({node: models for node, (_, models) in self._lists.items()})
        made, self._made = self._made, {}
        listed: dict[str, Listed] = {}
        found: dict[str, _Pairs] = {}
        for key, contents in named.items():
            keeper: Model | None = None
            for digest in _by_precedence(contents, held):
                parts: list[object] = [*contents[digest], *held[digest], *held[digest].values()]
                parts += in_ollama.get(digest, ())
                last = made.get(key) if len(contents) == 1 else None
                if last is not None and len(parts) == len(last[0]) and all(map(is_, parts, last[0])):
                    self._made[key] = last
                    _, entry, pairs = last
                else:
                    best = _best(contents[digest])
                    if keeper is not None:
                        choices = distinct_names(replace(best, digest=digest), keeper)
                        best = replace(best, name=next((n for n in choices if n not in listed), choices[-1]))
                    entry, pairs = _entry(best, held[digest], in_ollama.get(digest, ()))
                    if len(contents) == 1:
                        self._made[key] = parts, entry, pairs
                keeper = keeper or entry.model
                listed[entry.model.name] = entry
                found[entry.model.name] = pairs
        return {name: listed[name] for name in sorted(listed, key=str.lower)}, found


def _kept(before: _List, models: tuple[Model, ...]) -> _List:
    """Return ``models`` as the list that follows ``before``."""
    if models is before[0]:
        return before
    known = {model.name: model for model in before[1]}
    return models, tuple(known[m.name] if m == known.get(m.name) else m for m in models)


def _by_precedence(contents: dict[str, list[Model]], held: dict[str, dict[str, Model]]) -> Iterable[str]:
    """Return the contents of one name, the one that keeps it first; see `Merger.merge`."""
    if len(contents) == 1:
        return contents
    return sorted(
        contents,
        key=lambda digest: (
            -any(_runs(model) for model in contents[digest]),
            min((model.since for model in contents[digest] if model.since), default=float("inf")),
            -len(held[digest]),
            -max(model.modified for model in contents[digest]),
            digest,
        ),
    )


def _best(models: list[Model]) -> Model:
    """Return the model that stands for equal ones of one name.

    A model from an Ollama store takes precedence over a plain file of the same name.
    """
    best = min(models, key=lambda model: (not _runs(model), not model.manifest, model.name))
    reason = template_refusal(best)
    return replace(best, only_ollama=best.only_ollama or reason) if reason else best


def _entry(best: Model, held: dict[str, Model], in_ollama: Sequence[Model]) -> tuple[Listed, _Pairs]:
    """Return the entry of a content named as ``best``, and the nodes that have it.

    ``held``: by node, its model of that content; ``in_ollama``: those of Ollama stores.
    """
    refusal = template_refusal(best)
    pairs = tuple((node, _as_named(model, best, refusal)) for node, model in held.items())
    entries = [entry for entry in in_ollama if entry.manifest == best.manifest]
    ollama_names = InOllama(
        tuple(sorted({entry.name for entry in entries})),
        tuple(sorted({entry.manifest for entry in entries})),
        fingerprint(best.template),
    )
    return Listed(best, tuple(held), ollama_names), pairs


def _grouped(
    lists: Mapping[str, tuple[Model, ...]],
) -> tuple[dict[str, list[Model]], dict[str, dict[str, Model]], dict[str, dict[str, list[Model]]]]:
    """Return digest → models in Ollama stores; digest → node → model; lower-case name → digest → models.

    ``lists``: by node, sorted.
    """
    by_manifest = {
        model.manifest: model
        for models in lists.values()
        for model in models
        if model.manifest and model.files and not model.unusable
    }
    in_ollama: dict[str, list[Model]] = {}
    held: dict[str, dict[str, Model]] = {}
    named: dict[str, dict[str, list[Model]]] = {}
    for node, models in lists.items():
        for model in models:
            readable = by_manifest.get(model.manifest, model)
            digest, entry = readable.digest, model
            if digest != model.digest:
                # The manifest covers all layers: another node may have read what this one can't.
                named_so = replace(readable, name=model.name)
                entry = _as_named(model, named_so, template_refusal(named_so))
            if model.manifest:
                in_ollama.setdefault(digest, []).append(model)
            by_node = held.setdefault(digest, {})
            if node not in by_node or (_runs(entry) and not _runs(by_node[node])):
                by_node[node] = entry
            named.setdefault(entry.name.lower(), {}).setdefault(digest, []).append(entry)
    return in_ollama, held, named


def _runs(model: Model) -> bool:
    return bool(model.files) and not model.unusable


def template_refusal(model: Model) -> str:
    """Return why the model's TEMPLATE can run in Ollama only, as sentences; empty if llama.cpp can use it."""
    reason = untranslatable(model.template)
    if not reason:
        return ""
    return (
        f"Its TEMPLATE can't be given to llama.cpp ({reason}), so only an Ollama can run it. "
        "Create it again with a simpler TEMPLATE to spread it."
    )


_FIELDS = tuple(field.name for field in fields(Model))
_OF_FILES = tuple(
    name in ("source", "files", "projector", "adapters", "modified", "unusable", "only_ollama")
    for name in _FIELDS
)
_values = attrgetter(*_FIELDS)


def _as_named(model: Model, named: Model, refusal: str) -> Model:
    """Return ``named`` with the files and file-related facts of ``model``, a node's copy of that content.

    ``refusal``: `template_refusal` of ``named``.
    """
    # Five times as fast as `replace`, which matters for thousands of models.
    columns = zip(_OF_FILES, _values(model), _values(named), strict=True)
    result = Model(*(own if of_files else shared for of_files, own, shared in columns))
    return replace(result, only_ollama=refusal) if refusal and not model.only_ollama else result

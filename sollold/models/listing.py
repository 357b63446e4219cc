"""Merges all nodes' models into one list: each with its name, its nodes and its names in Ollama. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, replace

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


def merge(
    lists: Mapping[str, tuple[Model, ...]],
) -> tuple[dict[str, Listed], dict[str, tuple[tuple[str, Model], ...]]]:
    """Merge the lists of all nodes into name → model with its nodes, and name → (node, model) pairs.

    Content is identified by digest, so a node that has it under another name counts too, and a model that one
    node knows only by Ollama's manifest is the same as the one another node can read. If several contents
    have the same name, it stays with runnable content, then with the content that has had the name longest,
    then with the one on the most nodes, then with the newest. The others get their folder's name, or the
    digest, into the tag.
    """
    in_ollama, held, named = _grouped(lists)
    listed: dict[str, Listed] = {}
    found: dict[str, tuple[tuple[str, Model], ...]] = {}
    for contents in named.values():
        order = sorted(
            contents,
            key=lambda d: (
                -any(_runs(model) for model in contents[d]),
                min((model.since for model in contents[d] if model.since), default=float("inf")),
                -len(held[d]),
                -max(m.modified for m in contents[d]),
                d,
            ),
        )
        for rank, digest in enumerate(order):
            # A model from an Ollama store takes precedence over a plain file of the same name.
            best = min(contents[digest], key=lambda model: (not _runs(model), not model.manifest, model.name))
            if reason := template_refusal(best):
                best = replace(best, only_ollama=best.only_ollama or reason)
            if not rank:
                keeper = best
            else:
                choices = distinct_names(replace(best, digest=digest), keeper)
                best = replace(best, name=next((name for name in choices if name not in listed), choices[-1]))
            pairs = tuple((node, _as_named(model, best)) for node, model in sorted(held[digest].items()))
            entries = [entry for entry in in_ollama.get(digest, ()) if entry.manifest == best.manifest]
            ollama_names = InOllama(
                tuple(sorted({entry.name for entry in entries})),
                tuple(sorted({entry.manifest for entry in entries})),
                fingerprint(best.template),
            )
            listed[best.name] = Listed(best, tuple(node for node, _ in pairs), ollama_names)
            found[best.name] = pairs
    names = sorted(listed, key=str.lower)
    return {name: listed[name] for name in names}, found


def _grouped(
    lists: Mapping[str, tuple[Model, ...]],
) -> tuple[dict[str, list[Model]], dict[str, dict[str, Model]], dict[str, dict[str, list[Model]]]]:
    """Return digest → models in Ollama stores; digest → node → model; lower-case name → digest → models."""
    by_manifest = {
        model.manifest: model
        for models in lists.values()
        for model in models
        if model.manifest and model.files and not model.unusable
    }
    in_ollama: dict[str, list[Model]] = {}
    held: dict[str, dict[str, Model]] = {}
    named: dict[str, dict[str, list[Model]]] = {}
    for node, models in sorted(lists.items()):
        for model in models:
            readable = by_manifest.get(model.manifest, model)
            digest = readable.digest
            # The manifest covers all layers: another node may have read what this one can't.
            entry = model if digest == model.digest else _as_named(model, replace(readable, name=model.name))
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


def _as_named(model: Model, named: Model) -> Model:
    """Return ``named`` with the files and file-related facts of ``model``, a node's copy of that content."""
    return replace(
        named,
        source=model.source,
        files=model.files,
        projector=model.projector,
        adapters=model.adapters,
        modified=model.modified,
        unusable=model.unusable,
        only_ollama=model.only_ollama or template_refusal(named),
    )

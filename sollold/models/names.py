"""Parses model names as Ollama does, and resolves a caller's name among the known models.

``[host/][namespace/]model[:tag]``: the tag follows the last ``:`` after the last ``/``; model, namespace and
host are read from the right. The defaults are ``registry.ollama.ai``, ``library`` and ``latest``. Case is
kept for display and ignored in comparisons.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache

from sollold.errors import Fault, Refusal
from sollold.facts import dataclass

HOST = "registry.ollama.ai"
NAMESPACE = "library"
TAG = "latest"
_HUB_HOSTS = ("hf.co", "huggingface.co")
_DEFAULT_SUFFIX = f":{TAG}"
_RETRY_SECONDS = 5.0
"""Seconds after which to retry when the model is on an offline node or its store is still being read."""

_MAX_COMPARED = 50
"""Maximum number of names that are compared in full to suggest similar ones."""
_MAX_PARTS = 20
"""Number of parts of a name that decide, by their occurrence, with which ones it is compared in full."""

NAMELESS = "model"
"""Model name for a file whose name has no character that is valid in a model name."""
_SUFFIX = ".gguf"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*(:\d{1,5})?")
LONGEST = 350
_QUANTIZATION = re.compile(
    r"(?:UD-|i1-)?(?:I?Q[1-8](?:_[0-9A-Z]{1,3})*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32|FP16|FP32)",
    re.IGNORECASE,
)
_QUANTIZED_STEM = re.compile(rf"(.+?)[-._]({_QUANTIZATION.pattern})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Name:
    """A model's name in its four parts."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def full(self) -> str:
        """All four parts, ``registry.ollama.ai/library/llama3.1:70b``."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"

    def __str__(self) -> str:
        """Return the name as displayed: without Ollama's host and ``library``, always with the tag."""
        name = f"{self.model}:{self.tag}"
        if self.host.lower() != HOST:
            return f"{self.host}/{self.namespace}/{name}"
        return name if self.namespace.lower() == NAMESPACE else f"{self.namespace}/{name}"

    @property
    def key(self) -> str:
        """Key that is equal for names that mean the same model."""
        return self.full.lower()

    @property
    def on_hub(self) -> bool:
        """Whether the name refers to a repository on Hugging Face."""
        return self.host.lower() in _HUB_HOSTS

    @property
    def cloud(self) -> bool:
        """Whether the name refers to a model in Ollama's cloud rather than to files."""
        tag = self.tag.lower()
        return tag == "cloud" or tag.endswith("-cloud")


def parse(text: str) -> Name:
    """Parse a name.

    Raises:
        ValueError: it is not a valid name; the message says why.
    """
    text = text.strip()
    for scheme in ("https://", "http://"):
        text = text.removeprefix(scheme)
    if not text:
        raise ValueError("invalid model name: it is empty")
    if len(text) > LONGEST:
        raise ValueError(f"invalid model name: it has more than {LONGEST} characters")
    if "@" in text and ":" in text.partition("@")[0]:
        # The message is logged and shown to others.
        raise ValueError("invalid model name: it may have no login (USER:PASSWORD@)")
    path, tag = text, TAG
    colon = text.rfind(":")
    if colon > text.rfind("/"):
        path, tag = text[:colon], text[colon + 1 :]
    parts = path.split("/")
    if len(parts) > 3:
        raise ValueError(f"invalid model name: {text!r} is not of the form [host/][namespace/]model[:tag]")
    parts = [HOST, NAMESPACE][: 3 - len(parts)] + parts
    host, namespace, model = parts
    for part, pattern in ((host, _HOST), (namespace, _PART), (model, _PART), (tag, _PART)):
        if not pattern.fullmatch(part):
            quoted = repr(part) if part == text else f"{part!r} in {text!r}"
            rule = f"{quoted} may have only letters, digits, '.', '_' and '-', and not begin with '.' or '-'"
            raise ValueError(f"invalid model name: {rule if part else f'a part of {text!r} is empty'}")
    return Name(host, namespace, model, tag)


def canonical(text: str) -> str:
    """Return a name in the canonical form that the catalogue uses.

    Raises:
        ValueError: it is not a valid name.
    """
    return str(parse(text))


def is_name(text: str) -> bool:
    """Return whether `parse` accepts it."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def of_file(stem: str) -> tuple[str, str]:
    """Return the model and tag implied by a file name (without ``.gguf`` and shard number).

    ``Llama-3-8B-Instruct-Q4_K_M`` gives ``("Llama-3-8B-Instruct", "Q4_K_M")``. Characters that are invalid in
    names become ``-``.
    """
    # Strip accents but keep the letters.
    letters = "".join(char for char in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(char))
    clean = re.sub(r"[^A-Za-z0-9_.\-]+", "-", letters).strip("-.") or NAMELESS
    match = _QUANTIZED_STEM.fullmatch(clean)
    return (match[1], match[2].upper()) if match else (clean, TAG)


def quantization_in(stem: str) -> str:
    """Return the quantization that a file name ends with or consists of; empty when there is none."""
    if _QUANTIZATION.fullmatch(stem):
        return stem.upper()
    tag = of_file(stem)[1]
    return "" if tag == TAG else tag


@dataclass(frozen=True, slots=True)
class Resolved:
    """The result of resolving a caller's name.

    Attributes:
        name: the one model meant; empty when there is none or more than one.
        candidates: the matching models when there is more than one.
        suggestions: similar names, when none matches.
        away: names of the offline nodes that have it, when none matches.
        unread: stores still being read for the first time, which may have it, when none matches.
    """

    asked: str
    name: str = ""
    candidates: tuple[str, ...] = ()
    suggestions: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def message(self) -> str:
        """Explanation of why the name is not exactly one model, as a sentence; empty when it is."""
        if self.name:
            return ""
        if self.candidates:
            return f"model {self.asked!r} could be any of {', '.join(self.candidates)}; name one of them"
        if self.away:
            verb = "which is" if len(self.away) == 1 else "which are"
            return (
                f"model {self.asked!r} is only on {' and '.join(self.away)}, {verb} offline: "
                "switched off, restarting or disconnected"
            )
        message = f"model {self.asked!r} not found"
        if self.unread:
            return f"{message} yet; still reading {' and '.join(self.unread[:3])}, try again in a moment"
        if self.suggestions:
            message += f"; did you mean {' or '.join(self.suggestions)}?"
        return message


class NameIndex:
    """Known (canonical) names, for quick look-ups."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = dict.fromkeys(names)
        """The names, in order."""

    def same(self, name: Name) -> str:
        """Return the known name that means the same model, or an empty string."""
        return self._by_key.get(name.key, "")

    def fitting(self, name: Name, *, tagged: bool, scoped: bool) -> list[str]:
        """Return the names of the same model; ``tagged``, ``scoped``: with the same tag, scope."""
        entries = self._by_model.get(name.model.lower(), ())
        return [text for text, entry in entries if _fits(name, entry, tagged=tagged, scoped=scoped)]

    def similar(self, wanted: str) -> tuple[str, ...]:
        """Return up to three names similar to ``wanted``; the default tag does not count as similarity."""
        import difflib  # rarely needed: keeps an idle daemon small

        wanted = wanted.removesuffix(_DEFAULT_SUFFIX).lower()
        likely: Iterable[str] = self._untagged
        if len(self._untagged) > _MAX_COMPARED:
            # A full comparison takes some 0.2 ms for each name.
            parts = [wanted[at : at + 2] for at in range(0, len(wanted) - 1, len(wanted) // _MAX_PARTS + 1)]
            likely = heapq.nlargest(
                _MAX_COMPARED, likely, key=lambda text: sum(map(text.__contains__, parts))
            )
        matches = difflib.get_close_matches(wanted, likely, n=3, cutoff=0.6)
        return tuple(self._untagged[text] for text in matches)

    @cached_property
    def _by_key(self) -> dict[str, str]:
        return {_parsed(text)[1]: text for text in reversed(self.names)}

    @cached_property
    def _by_model(self) -> dict[str, list[tuple[str, Name]]]:
        by_model: defaultdict[str, list[tuple[str, Name]]] = defaultdict(list)
        for text in self.names:
            name, _, model = _parsed(text)
            by_model[model].append((text, name))
        return by_model

    @cached_property
    def _untagged(self) -> dict[str, str]:
        return {text.lower().removesuffix(_DEFAULT_SUFFIX): text for text in self.names}


@lru_cache(maxsize=2**15)
def _parsed(text: str) -> tuple[Name, str, str]:
    """Return a known name, its key and its model in lower case."""
    name = parse(text)
    return name, name.key, name.model.lower()


def resolve(
    asked: str,
    known: Iterable[str] | NameIndex,
    aliases: Mapping[str, str] | None = None,
    *,
    suggest: bool = True,
) -> Resolved:
    """Resolve a name among the ``known`` (canonical) names.

    ``suggest``: look for similar names if none matches, which takes longer than all the rest.

    Order: an alias; the name as written; ignoring case; with the other host of Hugging Face; without a tag,
    the model's only tag; without host and namespace, the only model of that name anywhere; a file name.
    """
    asked = behind_alias(asked, aliases)
    index = known if isinstance(known, NameIndex) else NameIndex(known)
    wanted = asked[: -len(_SUFFIX)] if asked.lower().endswith(_SUFFIX) else asked
    try:
        name = parse(wanted)
    except ValueError:
        return _by_file_name(asked, wanted, index, suggest=suggest)
    if str(name) in index.names:
        return Resolved(asked, str(name))
    for host in (name.host, *(_HUB_HOSTS if name.on_hub else ())):
        if same := index.same(replace(name, host=host)):
            return Resolved(asked, same)
    tagged = ":" in wanted.rsplit("/", 1)[-1]
    scoped = "/" in wanted
    fitting = index.fitting(name, tagged=tagged, scoped=scoped)
    if not fitting and name.tag.lower() == TAG:
        model, tag = of_file(name.model)
        fitting = index.fitting(Name(name.host, name.namespace, model, tag), tagged=True, scoped=scoped)
    if len(fitting) == 1:
        return Resolved(asked, fitting[0])
    if fitting:
        return Resolved(asked, candidates=tuple(sorted(fitting)))
    return Resolved(asked, suggestions=index.similar(str(name)) if suggest else ())


def _by_file_name(asked: str, wanted: str, index: NameIndex, *, suggest: bool) -> Resolved:
    """Resolve a file name, which may contain characters that are invalid in model names."""
    stem = wanted.rsplit("/", 1)[-1].strip()
    if not stem:
        return Resolved(asked)
    model, tag = of_file(stem)
    fitting = index.fitting(Name(HOST, NAMESPACE, model, tag), tagged=tag != TAG, scoped=False)
    # If no character of the name is valid in a model name, there is nothing left to compare.
    if len(fitting) == 1 and model != NAMELESS:
        return Resolved(asked, fitting[0])
    if not suggest:
        return Resolved(asked)
    return Resolved(asked, suggestions=tuple(sorted(fitting)[:3]) or index.similar(f"{model}:{tag}"))


def exact(asked: str, known: Iterable[str] | NameIndex, aliases: Mapping[str, str] | None = None) -> Resolved:
    """Resolve a name where guessing would be wrong: for models to be pulled or deleted.

    Only an alias or the full name, ignoring case, matches. What `resolve` would have chosen is suggested.
    """
    asked = behind_alias(asked, aliases)
    index = known if isinstance(known, NameIndex) else NameIndex(known)
    try:
        name = parse(asked)
    except ValueError:
        return Resolved(asked)
    if same := index.same(name):
        return Resolved(asked, same)
    guess = resolve(asked, index)
    suggestions = (guess.name,) if guess.name else guess.candidates or guess.suggestions
    return Resolved(asked, suggestions=suggestions)


def behind_alias(asked: str, aliases: Mapping[str, str] | None) -> str:
    """Return the target of an alias from the settings; any other name is returned unchanged."""
    asked = asked.strip()
    for alias, target in (aliases or {}).items():
        if asked.lower() in (alias.lower(), f"{alias.lower()}:{TAG}"):
            return target.strip()
    return asked


def _fits(name: Name, entry: Name, *, tagged: bool, scoped: bool) -> bool:
    if name.model.lower() != entry.model.lower():
        return False
    if tagged and name.tag.lower() != entry.tag.lower():
        return False
    if not scoped:
        return True
    same_host = name.host.lower() == entry.host.lower() or (name.on_hub and entry.on_hub)
    return same_host and name.namespace.lower() == entry.namespace.lower()


def unresolved(resolved: Resolved) -> Refusal:
    """Return the refusal for a caller's name that is not exactly one model."""
    if resolved.candidates:
        return Refusal(Fault.AMBIGUOUS, resolved.message)
    if resolved.away or resolved.unread:
        return Refusal(Fault.UNAVAILABLE, resolved.message, retry_after=_RETRY_SECONDS)
    return Refusal(Fault.NOT_FOUND, resolved.message)

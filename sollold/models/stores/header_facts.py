"""Reads the facts of a model's header that users and routers need; cached by the files' stamps."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import msgspec

from sollold.errors import system_reason
from sollold.facts import dataclass
from sollold.models.footprint.read_shape import block_of
from sollold.models.gguf import reader as gguf
from sollold.models.gguf.header import GgufError, Header
from sollold.models.gguf.tensor_types import TENSOR_TYPES
from sollold.models.gguf.vocabulary import vocabulary
from sollold.models.stores import content_digest, llama_support
from sollold.models.stores.permission_hint import permission_hint
from sollold.models.stores.scan_result import stamp
from sollold.settings.state_file import save_json
from sollold.undecodable import UNDECODABLE

log = logging.getLogger("sollold.models")

_EDITION = 9
"""Version of the cache, increased when facts change their meaning so that cached ones are discarded."""

_FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}
"""``general.file_type`` (llama.cpp: enum llama_ftype)."""

_ENCODERS = ("bert", "t5encoder", "gemma-embedding", "llama-embed", "eurobert")
_SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "expert_count",
    "expert_used_count",
    "vocab_size",
)
"""Header keys, after the architecture, of numbers that are not negative and fit into 31 bits."""
_RANK = 4
"""``pooling_type`` of a reranker."""
_CLASSIFIERS = ("cls.output.weight", "cls.weight")
"""Tensors that identify a reranker whose header does not."""


@dataclass(frozen=True, slots=True)
class HeaderFacts:
    """The facts of one model's files.

    ``kind``: ``model``, ``projector`` or ``adapter``. ``files``: in shard order. ``unusable`` and
    ``only_ollama``: as in `sollold.models.model.Model`; with ``unusable`` the rest may be empty. ``widths``:
    lengths of the embeddings that a model takes, or that a projector may produce; empty: unknown.
    ``vocabulary``: as returned by `sollold.models.gguf.vocabulary`.
    """

    kind: str = "model"
    digest: str = ""
    files: tuple[str, ...] = ()
    size: int = 0
    architecture: str = ""
    layers: int = 0
    parameters: int = 0
    quantization: str = ""
    context_train: int = 0
    capabilities: tuple[str, ...] = ()
    chat_template: bool = False
    widths: tuple[int, ...] = ()
    vocabulary: str = ""
    unusable: str = ""
    only_ollama: str = ""


def read_facts(files: tuple[str, ...]) -> HeaderFacts:
    """Read the facts of a model's files. Faults in their content never raise. Blocks.

    Raises:
        OSError: a file can't be opened at present, whatever its content.
    """
    for path in files:
        # Without O_NONBLOCK a named pipe would block forever.
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        header = gguf.read_files(_of_one_model(files))
    except GgufError as error:
        reason = _sentence(f"{error.reason} (at byte {error.offset})")
        if len(files) > 1:
            # With several files, name the faulty one. A single file is named by the caller, maybe as a link.
            reason = f"{error.path}: {reason}"
        return HeaderFacts(files=files, unusable=reason)
    return facts_of(header)


def _of_one_model(files: tuple[str, ...]) -> tuple[str, ...]:
    """Return all files if they are shards; only the last if it is complete (older layers may precede it)."""
    if len(files) > 1 and gguf_split_count(files[-1]) <= 1:
        return files[-1:]
    return files


def gguf_split_count(path: str) -> int:
    """Return the number of shards that a file's header gives; 1 if it gives none.

    Raises:
        GgufError: as `sollold.models.gguf.reader.read_files`, for any fault other than missing shards.
    """
    try:
        return gguf.read_files([path]).integer("split.count", 1)
    except GgufError as error:
        if "shard" in error.reason:
            return 2
        raise


def facts_of(header: Header) -> HeaderFacts:
    """Return the facts of a header, with the content digest. Reads a few MB."""
    return replace(facts_without_digest(header), digest=content_digest.of_files(header))


def facts_without_digest(header: Header) -> HeaderFacts:
    """Return the facts of a header without the digest."""
    arch = header.architecture
    kind = _kind(header)
    facts = HeaderFacts(
        kind=kind,
        files=header.files,
        size=header.size,
        architecture=arch,
        layers=max(0, header.integer(f"{arch}.block_count")),
        parameters=sum(tensor.elements for tensor in header.tensors),
        quantization=quantization(header),
        context_train=max(0, header.integer(f"{arch}.context_length")),
        capabilities=capabilities(header),
        chat_template=bool(header.text("tokenizer.chat_template")),
        widths=_widths(header, kind),
        vocabulary=_vocabulary(header) if kind == "model" else "",
        only_ollama=llama_support.refusal(header),
    )
    if kind == "model" and not arch:
        return replace(
            facts, unusable="Its header has no architecture, so it is not a model. Download it again."
        )
    if kind == "model" and not header.tensors:
        return replace(facts, unusable="It has no weights, only a vocabulary. Download the whole model.")
    if kind == "model" and (reason := _contradiction(header, facts.layers)):
        return replace(facts, unusable=f"{reason}. It is damaged or incomplete: download it again.")
    return facts


def _vocabulary(header: Header) -> str:
    try:
        return vocabulary(header)
    except OSError as error:
        log.info("the vocabulary of %s can't be read: %s", header.files[0], system_reason(error))
        return ""


def _widths(header: Header, kind: str) -> tuple[int, ...]:
    if kind != "projector":
        return (header.integer(f"{header.architecture}.embedding_length"),)
    found = {tensor.shape[-1] for tensor in header.tensors if tensor.name.startswith("mm.")}
    declared = (header.integer(f"clip.{part}.projection_dim") for part in ("vision", "audio"))
    return tuple(sorted(width for width in {*found, *declared} if width > 1)) if found else ()


def fits(model: HeaderFacts, projector: HeaderFacts) -> bool:
    """Return whether a projector may produce embeddings of the model's width, according to the headers."""
    comparable = bool(projector.widths) and any(width > 0 for width in model.widths)
    return not comparable or bool(set(model.widths) & set(projector.widths))


def _contradiction(header: Header, layers: int) -> str:
    """Return a contradiction between the header's metadata and its tensors; empty if there is none.

    A layer may have no tensors of its own, but not most of them; a layer with attention has heads.
    """
    for key in _SIZES:
        for value in header.integers(f"{header.architecture}.{key}"):
            if not 0 <= value < 1 << 31:
                return f"Its header declares {key} as {value}"
    if layers > len(header.tensors):
        blocks = {block for tensor in header.tensors if (block := block_of(tensor)) is not None}
        return f"Its header declares {layers} layers but lists tensors of {len(blocks)}"
    heads = header.integers(f"{header.architecture}.attention.head_count")
    attends = any(tensor.name.endswith((".attn_q.weight", ".attn_qkv.weight")) for tensor in header.tensors)
    if attends and heads and max(heads) < 1:
        return "Its layers have attention, but its header declares no attention heads"
    return ""


def _kind(header: Header) -> str:
    declared = header.text("general.type", "model")
    if declared in ("mmproj", "projector") or header.architecture == "clip":
        return "projector"
    if declared == "adapter" or "adapter.type" in header.metadata:
        return "adapter"
    return "model"


def quantization(header: Header) -> str:
    """Return the quantization as users write it; the type with the most bytes if the header gives none."""
    if name := _FILE_TYPES.get(header.integer("general.file_type", -1)):
        return name
    sizes: dict[int, int] = {}
    for tensor in header.tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size
    return TENSOR_TYPES[max(sizes, key=lambda kind: sizes[kind])].name if sizes else ""


def capabilities(header: Header) -> tuple[str, ...]:
    """Return the model's capabilities in Ollama's terms, from header and chat template, and ``rerank``."""
    arch = header.architecture
    pooling = header.metadata.get(f"{arch}.pooling_type")
    if pooling == _RANK or any(tensor.name in _CLASSIFIERS for tensor in header.tensors):
        return ("embedding", "rerank")
    if pooling is not None or any(word in arch for word in _ENCODERS):
        return ("embedding",)
    template = header.text("tokenizer.chat_template")
    features = ["completion"]
    if "tools" in template or "tool_call" in template:
        features.append("tools")
    if any(key in header.metadata for key in _INSERT_KEYS):
        features.append("insert")
    if any(word in template for word in ("<think>", "enable_thinking", "reasoning_content", "<|channel|>")):
        features.append("thinking")
    return tuple(features)


_INSERT_KEYS = ("tokenizer.ggml.fim_pre_token_id", "tokenizer.ggml.prefix_token_id")


def template_capabilities(template: str) -> tuple[str, ...]:
    """Return the capabilities that Ollama's template (Go) implies besides ``completion``."""
    markers = (("tools", (".Tools",)), ("insert", (".Suffix",)), ("thinking", (".Think", "<think>")))
    return tuple(word for word, signs in markers if any(sign in template for sign in signs))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


class HeaderFactsCache:
    """Facts by the files' stamps, in memory and on disk. Blocks; `of` may be called in any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._facts: dict[str, HeaderFacts] = {}
        self._changed = False

    def load(self) -> None:
        """Read the facts of the last run; none if the file is damaged or of another version."""
        try:
            edition, facts = msgspec.json.decode(
                self._path.read_bytes(), type=tuple[int, dict[str, HeaderFacts]]
            )
        except (OSError, *UNDECODABLE):
            return
        if edition == _EDITION:
            self._facts = facts

    def of(self, files: tuple[str, ...], used: set[str]) -> HeaderFacts:
        """Return the facts of a model's files, read only if a file has changed; add their key to ``used``."""
        key = "|".join(f"{path}={stamp(path)}" for path in files)
        used.add(key)
        facts = self._facts.get(key)
        if facts is None:
            try:
                facts = read_facts(files)
            except OSError as error:
                path = error.filename or files[0]
                reason = f"{path} can't be read: {system_reason(error)}."
                if isinstance(error, PermissionError):
                    reason += f" Run: {permission_hint(Path(path), Path(path).parent)}"
                return HeaderFacts(files=files, unusable=reason)
            self._facts[key] = facts
            self._changed = True
        return facts

    def keep(self, used: Collection[str] | None) -> None:
        """Forget facts whose keys are not in ``used`` (None: keep all), and write the rest if any changed."""
        for key in [key for key in list(self._facts) if used is not None and key not in used]:
            self._facts.pop(key, None)
            self._changed = True
        if not self._changed:
            return
        self._changed = False
        save_json(self._path, (_EDITION, self._facts.copy()))

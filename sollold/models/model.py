"""A model as the catalogue knows it: where its files lie and what its header says."""

from __future__ import annotations

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """One model on one node, by the name that clients use.

    Attributes:
        name: canonical, with its tag (``llama3.1:70b``, ``demo:latest``).
        digest: identity of the content (hex sha256), the same wherever the files lie: in a store, a
            cache or a folder, on any node. Over headers, sizes and samples
            (`sollold.models.stores.content_digest`).
        manifest: Ollama's manifest digest (hex sha256), what its API calls the digest; empty elsewhere.
        source: ``ollama``, ``folder``, ``huggingface``, ``llama.cpp``, ``demo``, or ``own`` for what
            was fetched on somebody's request and may be deleted again.
        files: the GGUF shards in order, absolute paths on the node; llama.cpp is given the first.
        projector: path of the mmproj file, or empty.
        adapters: paths of LoRA adapters.
        size: bytes of all files.
        modified: seconds since the epoch.
        layers: block count, without the output; ``width``: elements of an embedding.
        listed_size: bytes of all layers of Ollama's manifest; 0 elsewhere. ``parent``: the model that Ollama
            says it was made of.
        since: when its content got this name on the node, seconds since the epoch; 0.0: not known.
        parameters: count of weights.
        quantization: as users write it (``Q4_K_M``).
        context_train: the context the model was trained with, in tokens.
        capabilities: Ollama's words: completion, tools, insert, vision, embedding, thinking; and ``rerank``
            beside ``embedding`` for a model that only orders documents by a query.
        template: Ollama's template text; empty when the file's own chat template is used. A file without
            one has ``{{ .Prompt }}``, as Ollama takes it to have.
        system: Ollama's system text.
        messages: (role, content) of Ollama's MESSAGEs, which come before every conversation.
        params: Ollama's default options as JSON text, ``{}`` when none.
        license: licence text.
        vocabulary: count and hash of its tokens (`sollold.models.gguf.vocabulary`); empty: not known.
        unusable: why it can't be run, as a sentence with what to do; empty when it can.
        only_ollama: why stock llama.cpp can't read it though Ollama can; empty when it can.
    """

    name: str
    digest: str
    source: str
    files: tuple[str, ...]
    size: int
    modified: float
    projector: str = ""
    adapters: tuple[str, ...] = ()
    architecture: str = ""
    layers: int = 0
    width: int = 0
    listed_size: int = 0
    parent: str = ""
    since: float = 0.0
    parameters: int = 0
    quantization: str = ""
    context_train: int = 0
    capabilities: tuple[str, ...] = ()
    template: str = ""
    system: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    params: str = "{}"
    license: str = ""
    unusable: str = ""
    only_ollama: str = ""
    manifest: str = ""
    vocabulary: str = ""

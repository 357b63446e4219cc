"""A model as the catalogue knows it: the location of its files and the facts from its header."""

from __future__ import annotations

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """One model on one node, by the name that clients use.

    Attributes:
        name: canonical, with its tag (``llama3.1:70b``, ``demo:latest``).
        digest: identity of the content (hex sha256), the same wherever the files are: in a store, a cache or
            a folder, on any node. Computed over headers, sizes and samples
            (`sollold.models.stores.content_digest`).
        manifest: Ollama's manifest digest (hex sha256), what its API calls the digest; empty elsewhere.
        source: ``ollama``, ``folder``, ``huggingface``, ``llama.cpp``, ``demo``, or ``own`` for models pulled
            at a user's request, which may be deleted again.
        files: the GGUF shards in order, as absolute paths on the node; llama.cpp is given the first.
        projector: path of the mmproj file, or empty.
        adapters: paths of LoRA adapters.
        size: total size of all files, in bytes.
        modified: modification time, in seconds since the epoch.
        layers: block count, without the output; ``width``: embedding length, in elements.
        listed_size: total size of all layers in Ollama's manifest, in bytes; 0 elsewhere. ``parent``: the
            parent model that Ollama reports.
        since: when its content got this name on the node, in seconds since the epoch; 0.0: unknown.
        parameters: number of weights.
        quantization: as users write it (``Q4_K_M``).
        context_train: the context the model was trained with, in tokens.
        capabilities: in Ollama's terms: completion, tools, insert, vision, embedding, thinking; and
            ``rerank`` beside ``embedding`` for a model that only ranks documents by a query.
        template: Ollama's template; empty when the file's own chat template is used. A file without one has
            ``{{ .Prompt }}``, as Ollama assumes.
        system: Ollama's system prompt.
        messages: (role, content) of Ollama's MESSAGEs, which precede every conversation.
        params: Ollama's default options as JSON, ``{}`` when none.
        license: licence text.
        vocabulary: count and hash of its tokens (`sollold.models.gguf.vocabulary`); empty: unknown.
        unusable: why it can't be run, as a sentence with what to do about it; empty when it can.
        named: whether a user gave it this name, so that no registry's model of that name replaces it.
        version: identifies the version that was pulled from Hugging Face's hub or Ollama's registry, as
            `sollold.models.transfer.hub_pull.version_of` or a manifest digest does; other text if unknown.
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
    named: bool = False
    version: str = ""

    @property
    def only_embeds(self) -> bool:
        """Whether it makes embeddings and can't generate text."""
        return "embedding" in self.capabilities and "completion" not in self.capabilities

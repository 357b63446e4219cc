"""Detects files that stock llama.cpp refuses though Ollama runs them, by the header or by a failed load.

Ollama's engine is a llama.cpp with a layer that translates files of Ollama's own converter while loading them
(ollama/ollama: llama/compat/README.md lists the cases; ggml-org/llama.cpp#27349 is a user's report of one).
Stock llama.cpp compares the number of tensors that it requested with that in the file, so a vision tower in
the same file, or a renamed tensor or key, makes the load fail.
"""

from __future__ import annotations

import re
from pathlib import Path

from sollold.facts import dataclass
from sollold.models.gguf.header import Array, Header
from sollold.settings.state_file import read_json, save_json

_OWN_ARCHITECTURES = {
    "gptoss": "gpt-oss",
    "qwen25vl": "qwen2vl",
    "mllama": "no llama.cpp architecture",
    "deepseekocr": "deepseek2-ocr",
    "glmocr": "glm4",
    "glm4moelite": "deepseek2",
    "olmo3": "olmo2",
    "nemotron_h_omni": "nemotron_h",
    "gemma3-text": "gemma3",
}
"""Architecture names that only Ollama's converter writes, with llama.cpp's name for the same."""

_TOWERS = ("v.", "mm.", "a.", "s.", "mtp.", "vision_tower.", "audio_tower.", "multi_modal_projector.")
"""Prefixes of tensors of vision and audio towers, and of Ollama's MTP layers."""

_MISSING_KEY = "{key} is missing from its header"


def refusal(header: Header) -> str:
    """Return why stock llama.cpp would refuse the file, as a sentence; empty if no reason is known."""
    reason = _reason(header)
    if not reason:
        return ""
    return (
        f"Stock llama.cpp can't read this file: {reason}. It was converted by Ollama for its own engine; "
        "run it with Ollama, or pull the same model from hf.co to spread it."
    )


def _reason(header: Header) -> str:
    architecture = header.architecture
    if llama_name := _OWN_ARCHITECTURES.get(architecture):
        return f"its architecture is called {architecture!r}, llama.cpp's is {llama_name}"
    if header.text("general.type", "model") != "model" or architecture == "clip":
        return ""
    names = {tensor.name for tensor in header.tensors}
    tower = next((name for name in sorted(names) if name.startswith(_TOWERS)), "")
    if tower:
        return f"it holds tensors of another model in the same file ({tower})"
    for marker in _MARKERS.get(architecture, ()):
        if reason := marker.met(header, names):
            return reason
    charsmap = header.metadata.get("tokenizer.ggml.precompiled_charsmap")
    if isinstance(charsmap, Array) and charsmap.values and isinstance(charsmap.values[0], str):
        return "its tokenizer's character map is written as text"
    return ""


@dataclass(frozen=True, slots=True)
class _Marker:
    """A sign of Ollama's converter: a key that is present, a key that is missing, or a tensor."""

    key: str = ""
    missing: str = ""
    tensor: str = ""

    def met(self, header: Header, names: set[str]) -> str:
        if self.key and self.key in header.metadata:
            return f"its header has {self.key}, which has another name in llama.cpp"
        if self.missing and self.missing not in header.metadata:
            return _MISSING_KEY.format(key=self.missing)
        if self.tensor and self.tensor in names:
            return f"its tensor {self.tensor} has another name in llama.cpp"
        return ""


_MARKERS: dict[str, tuple[_Marker, ...]] = {
    "gemma3": (
        _Marker(tensor="dense.0.weight"),
        _Marker(key="gemma3.rope.global.freq_base"),
        _Marker(key="gemma3.rope.local.freq_base"),
        _Marker(missing="gemma3.attention.layer_norm_rms_epsilon"),
    ),
    "mistral3": (_Marker(key="mistral3.rope.scaling.beta_fast"),),
    "qwen3next": (_Marker(tensor="blk.0.ssm_dt"),),
    "qwen35": (_Marker(tensor="blk.0.ssm_dt"),),
    "qwen35moe": (_Marker(tensor="blk.0.ssm_dt"),),
    "laguna": (_Marker(key="laguna.rope.swa.freq_base"), _Marker(tensor="blk.0.attn_g.weight")),
}

_FORMAT_FAULT = re.compile(
    r"unknown model architecture|wrong number of tensors|missing tensor|has wrong shape"
    r"|key not found in model|unknown pre-tokenizer type|unknown tokenizer"
    r"|error loading model (?:vocabulary|hyperparameters)",
    re.IGNORECASE,
)


def format_fault(log_text: str) -> str:
    """Return the log line in which llama-server reports that it can't read the file's format, if any.

    Failures of memory or of a worker do not count: they are temporary.
    """
    for line in reversed(log_text.splitlines()):
        if _FORMAT_FAULT.search(line):
            return line.strip()[:300]
    return ""


class RefusedModels:
    """Loads that failed because of the file's format, stored on disk by content and llama.cpp build.

    Another build may be able to read the file, so it is tried again. Blocks: call `load` and `remember` in a
    thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reasons: dict[str, str] = {}

    def load(self) -> None:
        """Read the stored refusals. A damaged file counts as empty."""
        self._reasons = read_json(self._path, dict[str, str]) or {}

    def reason(self, digest: str, build: str) -> str:
        """Return why this build refused the content; empty if it did not."""
        return self._reasons.get(f"{digest} {build}", "")

    def remember(self, digest: str, build: str, reason: str) -> None:
        """Store a refusal. A failure to write is only logged."""
        while len(self._reasons) >= 1000:
            del self._reasons[next(iter(self._reasons))]
        self._reasons[f"{digest} {build}"] = reason
        save_json(self._path, self._reasons)

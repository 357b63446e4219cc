"""The header metadata that memory depends on, with llama.cpp's defaults.

Read as in llama.cpp's ``load_hparams`` and each architecture's loader; differences between architectures are
data in `sollold.models.footprint.architectures`.
"""

from __future__ import annotations

from sollold.models.footprint.architectures import ARCHITECTURES, UNKNOWN, Architecture
from sollold.models.gguf.header import Header

_ALTUP_RANK = 256


class Hparams:
    """The hyperparameters of one model; names follow llama.cpp's ``llama_hparams`` where possible."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.arch = header.architecture
        self.row: Architecture = ARCHITECTURES.get(self.arch, UNKNOWN)
        self.count = min(max(self.integer("block_count"), 1), 1024)
        self.trunk = max(self.count - self.integer("nextn_predict_layers"), 0)
        self.embd = self.integer("embedding_length")
        self.heads = self.each("attention.head_count", 0)
        self.heads_kv = self.each("attention.head_count_kv", self.heads)
        self.ff = self.each("feed_forward_length", 0)
        self.used = self.each("expert_used_count", 0)
        head = self.embd // max(self.heads[0], 1)
        self.head_k = self.integer("attention.key_length", head)
        self.head_v = self.integer("attention.value_length", head)
        self.head_k_swa = self.integer("attention.key_length_swa", self.head_k)
        self.head_v_swa = self.integer("attention.value_length_swa", self.head_v)
        self.window = self._window()
        self.windowed = self._windowed()
        shared = self.integer("attention.shared_kv_layers")
        self.kv_layers = self.row.kv_from_start or self.count - shared
        self.per_layer = self.integer("embedding_length_per_layer_input")
        if self.row.streams > 1:
            self.per_layer = _ALTUP_RANK
        self.latent = 0
        if self.integer("attention.key_length_mla"):
            self.latent = self.integer("attention.kv_lora_rank")

    def integer(self, key: str, default: int = 0) -> int:
        """Return an integer from the metadata under the architecture's prefix; the default if it is negative,
        which llama.cpp refuses."""
        value = self.header.integer(f"{self.arch}.{key}", default)
        return value if value >= 0 else default

    def each(self, key: str, default: int | tuple[int, ...]) -> tuple[int, ...]:
        """Return one integer per layer, from a single value or an array; ``default`` if there is neither."""
        values = tuple(max(value, 0) for value in self.header.integers(f"{self.arch}.{key}"))
        if len(values) == 1:
            return values * self.count
        if len(values) >= self.count:
            return values[: self.count]
        return default if isinstance(default, tuple) else (default,) * self.count

    def _window(self) -> int:
        size = self.integer("attention.sliding_window", -1)
        if self.row.window == "none" or size == 0 or self.trunk != (self.row.window_blocks or self.trunk):
            return 0
        if isinstance(self.row.window, int):
            return self.row.window if self.row.fixed or size < 0 else size
        return max(size, 0)

    def _windowed(self) -> tuple[bool, ...]:
        if not self.window or self.row is UNKNOWN:
            return (False,) * self.count
        pattern = self.header.integers(f"{self.arch}.attention.sliding_window_pattern")
        if len(pattern) >= self.count:
            return tuple(bool(value) for value in pattern[: self.count])
        every = pattern[0] if len(pattern) == 1 else self.row.every
        if every <= 0:
            return (True,) * self.count
        full = 0 if self.row.dense_first else every - 1
        return tuple(index % every != full for index in range(self.count))

    def recurrent(self, index: int) -> bool:
        """Return whether a layer keeps a recurrent state."""
        if index >= self.trunk:
            return False
        rule = self.row.recurrent
        if rule in ("all", "both"):
            return True
        if rule == "kv0":
            return self.heads_kv[index] == 0
        if rule == "kv0ff0":
            return self.heads_kv[index] == 0 and self.ff[index] == 0
        if rule == "interval":
            listed = self.header.integers(f"{self.arch}.attention.recurrent_layers")
            if len(listed) >= self.count:
                return bool(listed[index])
            return (index + 1) % max(self.integer("full_attention_interval", 4), 1) != 0
        return False

    def source(self, index: int) -> int:
        """Return the layer whose cache a layer without its own uses; -1: none."""
        if index < self.kv_layers or self.kv_layers < 2 or index >= self.trunk:
            return -1
        return self.kv_layers - (2 if self.windowed[index] else 1)

    def attends(self, index: int) -> bool:
        """Return whether a layer has its own KV cache."""
        if index >= self.trunk or index >= self.kv_layers or not (self.row.cache or self.row.idle_cache):
            return False
        if self.row.recurrent == "all":
            return False
        if self.row.recurrent == "kv0ff0":
            return self.heads_kv[index] > 0 and self.ff[index] == 0
        return self.row.recurrent in ("no", "both") or not self.recurrent(index)

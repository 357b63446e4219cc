"""All architectures that test models can be written of, by the name that tests use."""

from __future__ import annotations

from tests.gguf import attention_models, recurrent_models
from tests.gguf.size import Architecture

ARCHITECTURES: dict[str, Architecture] = attention_models.MODELS | recurrent_models.MODELS

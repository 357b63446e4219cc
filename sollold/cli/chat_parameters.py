"""``/set parameter`` in a conversation: Ollama's parameter names and their types."""

from __future__ import annotations

import json
import math
from typing import Any

from sollold.did_you_mean import did_you_mean

WHOLE = ("num_ctx", "num_predict", "num_keep", "seed", "top_k", "repeat_last_n", "mirostat")
FRACTIONS = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "presence_penalty",
    "frequency_penalty",
    "mirostat_tau",
    "mirostat_eta",
)
OURS = ("num_gpu", "num_thread", "num_batch", "main_gpu", "use_mmap", "numa")
"""Ollama's parameters for placing layers, which sollold decides by itself."""


def parameter(name: str, text: str) -> Any:
    """Parse ``text`` as the value of the parameter ``name``; for ``stop``, the list of sequences.

    Raises:
        ValueError: unknown parameter or invalid value; its message says which.
    """
    if name == "stop":
        return _sequences(text)
    if name in OURS:
        raise ValueError(f"{name} is not set here: sollold decides how layers are placed")
    if name not in (*WHOLE, *FRACTIONS):
        hint = did_you_mean(name, (*WHOLE, *FRACTIONS, "stop"))
        raise ValueError(f"unknown parameter {name}{hint}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (name in WHOLE and not number.is_integer()):
        raise ValueError(f"{name} must be a {'whole ' if name in WHOLE else ''}number, not {text!r}")
    return int(number) if name in WHOLE else number


def _sequences(text: str) -> list[str]:
    """Stop sequences separated by spaces (``A B``), quoted if they contain spaces, or as a JSON list."""
    try:
        read = json.loads(text)
    except ValueError:
        return text.split()
    found = read if isinstance(read, list) else [read]
    return [value if isinstance(value, str) else json.dumps(value) for value in found]

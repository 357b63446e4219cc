"""``/set parameter`` of a conversation: Ollama's names, and what their values are."""

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
"""Parameters of Ollama's that place layers, which the planner does here."""


def parameter(name: str, text: str) -> Any:
    """The value that ``text`` is for the parameter ``name``; of ``stop``: the sequences.

    Raises:
        ValueError: there is no such parameter, or it has no such value; says so.
    """
    if name == "stop":
        return _sequences(text)
    if name in OURS:
        raise ValueError(f"{name} is not set here: sollold decides how layers are placed")
    if name not in (*WHOLE, *FRACTIONS):
        near = did_you_mean(name, (*WHOLE, *FRACTIONS, "stop"))
        raise ValueError(f"unknown parameter {name}{near}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (name in WHOLE and not number.is_integer()):
        raise ValueError(f"{name} must be a {'whole ' if name in WHOLE else ''}number, not {text!r}")
    return int(number) if name in WHOLE else number


def _sequences(text: str) -> list[str]:
    """``END`` or ``A B``, each a sequence; one in quotes may have blanks; a list as JSON."""
    try:
        read = json.loads(text)
    except ValueError:
        return text.split()
    found = read if isinstance(read, list) else [read]
    return [one if isinstance(one, str) else json.dumps(one) for one in found]

"""The llama.cpp that `make setup` built, if there is one."""

from __future__ import annotations

from sollold.engines.install.find import Llama, find
from sollold.settings.paths import places
from sollold.settings.schema import LlamaSettings, NodeSettings


def found_llama() -> tuple[Llama | None, str]:
    """The llama.cpp found here; None with a message if there is none."""
    found, passed = find(LlamaSettings(), places(NodeSettings()).cache)
    return (
        found,
        "" if found is not None else f"no llama.cpp here: {'; '.join(map(str, passed)) or 'run make setup'}",
    )


def required_llama() -> Llama:
    """The llama.cpp found here.

    Raises:
        SystemExit: there is none.
    """
    found, _ = found_llama()
    if found is None:
        raise SystemExit("no llama.cpp: run `sollold setup`")
    return found

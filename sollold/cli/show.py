"""``sollold show``: describe a model."""

from __future__ import annotations

import argparse
from typing import Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.cli.streams import harmless

PARTS = ("license", "modelfile", "parameters", "system", "template")
"""Parts that can be printed alone, by their fields in ``/api/show``."""


def show(options: argparse.Namespace) -> int:
    """Print a summary, or one part of the model's description."""
    found = client(options).post("/api/show", {"model": options.model})
    if options.json:
        print_json(found)
        return Exit.DONE
    print_part(found, options.part)
    return Exit.DONE


def print_part(found: dict[str, Any], part: str) -> None:
    """Print one part of a model's description (``/api/show``); without ``part``, a summary."""
    if part:
        print(harmless(str(found.get(part) or "")))
        return
    details, info = found.get("details", {}), found.get("model_info", {})
    architecture = str(info.get("general.architecture", details.get("family", "")))
    rows = [
        ("architecture", architecture),
        ("parameters", str(details.get("parameter_size", ""))),
        ("quantization", str(details.get("quantization_level", ""))),
        ("context length", str(info.get(f"{architecture}.context_length", ""))),
        ("embedding length", str(info.get(f"{architecture}.embedding_length", ""))),
        ("layers", str(info.get(f"{architecture}.block_count", ""))),
        ("capabilities", ", ".join(found.get("capabilities", []))),
        ("on nodes", ", ".join(found.get("nodes", []))),
        ("not usable", str(found.get("unusable", ""))),
        ("note", str(found.get("note", ""))),
    ]
    out = console()
    width = max(len(title) for title, _ in rows)
    for title, value in rows:
        if value:
            out.print(f"{title:<{width}}  {value}")
    for part in ("parameters", "system", "license"):
        if text := str(found.get(part) or "").strip():
            lines = text.splitlines()
            ellipsis = "" if part != "license" or len(lines) <= 2 else " …"
            shown = lines[:2] if part == "license" else lines
            out.print(f"\n{part}", style="bold")
            out.print("\n".join(f"  {line}" for line in shown) + ellipsis)

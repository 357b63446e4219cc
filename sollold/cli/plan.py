"""``sollold plan`` and ``sollold route``: explain what would happen, without doing it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.cli.load import wishes
from sollold.cli.status import layers_text
from sollold.client.errors import ClientError
from sollold.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from rich.console import Console

BAR = 40
KINDS = (
    ("weights", "█", "cyan"),
    ("state", "▓", "green"),
    ("compute", "▒", "yellow"),
    ("overhead", "░", "dim"),
)
"""Kinds of memory, as drawn in the bars."""


def plan(options: argparse.Namespace) -> int:
    """Show the plan as bars, or how much memory is missing and what would help."""
    daemon = client(options)
    try:
        preview = daemon.post("/api/cluster/plan", wishes(options))
    except ClientError as error:
        missing = error.message.startswith(f"model {options.model!r} not found")  # not a draft model
        if missing and not options.online and "/" not in options.model:
            import shlex  # seldom needed

            command = f"sollold plan --online {shlex.quote(options.model)}"
            hint = f"(to plan it from its header in Ollama's registry: {command})"
            raise ClientError(f"{error.message} {hint}", error.status) from None
        raise
    state = daemon.get("/api/cluster")
    if options.json:
        print_json(preview)
    else:
        names = {node["node"]: node["name"] for node in (*state.get("offline", ()), *state["nodes"])}
        _show(console(), preview, names)
    return Exit.DONE if preview["ok"] else Exit.TOO_BIG


def _show(out: Console, preview: dict[str, Any], names: dict[str, str]) -> None:
    layout = preview.get("plan")
    if layout:
        _bars(out, layout, preview, names)
    out.print(_without_remedies(preview["reason"] or preview.get("message", ""), preview.get("missing")))
    reasons = (layout or {}).get("reasons", [])
    for reason in reasons:
        out.print(f"  - {reason}")
    for deployment, model in preview.get("evicts", []):
        # The second form is that of a daemon of an older release.
        phrases = (f"{model} is idle ", f"{model}, idle, ")
        if not any(reason.startswith(phrases) for reason in reasons):
            out.print(f"  - {model} ({deployment}) would be unloaded")
    if missing := preview.get("missing"):
        _missing(out, missing)
    if options := preview.get("options"):
        out.print("\nAlternatives considered:")
        for option in options:
            speed = f"{option['tokens_per_second']:.1f} tokens/s" if option["tokens_per_second"] else "no"
            out.print(f"  - {option['what']}: {speed}; {option['reason']}")
    if preview.get("estimate"):
        out.print("\nUnknown architecture: sizes are conservative estimates.")


def _without_remedies(text: str, missing: dict[str, Any] | None) -> str:
    """``text`` without its sentence on remedies, which are printed as a list."""
    remedies = "; ".join(missing["remedies"]) if missing else ""
    return text.replace(f" What would help: {remedies}.", "")


def _bars(out: Console, layout: dict[str, Any], preview: dict[str, Any], names: dict[str, str]) -> None:
    from rich.text import Text

    from sollold.cli.bar import Bar
    from sollold.cli.fitting import Fitting

    free_after = {(free["node"], free["device"]): free["after"] for free in preview.get("free", [])}
    shares = [share for share in (layout["host"], *layout["shares"]) if _total(share)]
    widest = max(_total(share) for share in shares)
    titles = ("node", "device", "layers", "", "bytes", "free after")
    table = Fitting(titles, right=titles[4:], whole=(*titles[:3], *titles[4:]), spare=("", "free after"))
    for share in shares:
        bar = Bar([(share[kind] / widest, sign, style) for kind, sign, style in KINDS], BAR)
        remaining = free_after.get((share["node"], share["device"]))
        table.add_row(
            names.get(share["node"], share["node"]) + (" (head)" if share is layout["host"] else ""),
            share["device"],
            layers_text(share, layout["layers"]),
            bar,
            bytes_text(_total(share)),
            bytes_text(remaining) if remaining is not None else "",
        )
    out.print(table)
    legend = Text()
    for kind, sign, style in KINDS:
        size = sum(share[kind] for share in shares)
        legend.append(f"{sign} ", style=style)
        legend.append(f"{'KV and state' if kind == 'state' else kind} {bytes_text(size)}   ")
    out.print(legend)
    words = [f"context {preview.get('context') or layout['run']['context']} tokens"]
    if layout["tokens_per_second"]:
        words.append(f"about {layout['tokens_per_second']:.1f} tokens/s")
    if preview.get("prompt_tokens_per_second"):
        words.append(f"reads prompts at about {preview['prompt_tokens_per_second']:.0f} tokens/s")
    if layout["load_seconds"]:
        # The estimate is of reading and sending the weights; to start the processes takes time, too.
        words.append(f"loads in about {seconds_text(max(1.0, layout['load_seconds']))}")
    out.print(", ".join(words) + "\n")


def _total(share: dict[str, Any]) -> int:
    return sum(int(share[kind]) for kind, _, _ in KINDS)


def _missing(out: Console, missing: dict[str, Any]) -> None:
    for word in ("needed", "there", "missing"):
        # Nothing is missing if the memory is in parts too small for a layer.
        if size := missing[word]:
            out.print(f"  {word:8} {bytes_text(size):>9}")
    if missing["remedies"]:
        out.print("\nWhat would help, cheapest first:")
        for remedy in missing["remedies"]:
            out.print(f"  - {remedy}")


def route(options: argparse.Namespace) -> int:
    """Print which endpoint would answer now, or what would be loaded."""
    daemon = client(options)
    found = daemon.post("/api/cluster/route", {"model": options.model})
    preview = daemon.post("/api/cluster/plan", {"model": options.model})
    # An endpoint that already serves needs no memory.
    status = Exit.DONE if found["endpoints"] or preview["ok"] else Exit.TOO_BIG
    if options.json:
        print_json({**found, "plan": preview})
        return status
    out = console()
    out.print(f"{found['model']} is on {', '.join(found['nodes']) or 'no node'}")
    for endpoint in found["endpoints"]:
        out.print(f"  {endpoint['score']:6.3f}  {endpoint['endpoint']} on {endpoint['node']}")
        out.print(f"          {endpoint['why']}", style="dim")
    if not found["endpoints"]:
        out.print("not loaded now; the first request would load it like this:")
    out.print(preview["reason"] or preview.get("message", ""))
    for reason in (preview.get("plan") or {}).get("reasons", []):
        out.print(f"  - {reason}")
    return status

"""``sollold scan``: workers of llama.cpp that others started on this LAN."""

from __future__ import annotations

import argparse
from typing import Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.units import bytes_text

_SECONDS = 120.0


async def scan(options: argparse.Namespace) -> int:
    """Have a node look around, and say what it found and how that would be used."""
    async with client(options, timeout=_SECONDS) as daemon:
        found = (await daemon.post("/api/cluster/scan", {}))["workers"]
    if options.json:
        print_json(found)
        return Exit.DONE
    if not found:
        print("no worker answers on this LAN; a `ggml-rpc-server -H ADDRESS` would, on port 50052")
        return Exit.DONE
    out = console()
    for worker in found:
        out.print(line(worker), soft_wrap=True)
    free = [worker["address"] for worker in found if worker["state"] == "usable" and not worker["named"]]
    if free:
        names = ", ".join(f'"{address}"' for address in free)
        out.print(
            "\nTo use them, in sollold.toml of the node that is to own them. They are plain: whoever is on "
            "the network can read and change what is computed there.\n"
            f"[llama]\nrpc_backends = [{names}]\nallow_plain_workers = true",
        )
    return Exit.DONE


def line(worker: dict[str, Any]) -> str:
    """One worker in a row."""
    words = [worker["address"], worker["state"]]
    if worker["devices"]:
        count = worker["devices"]
        words.append(f"{count} device{'s' if count != 1 else ''}, {bytes_text(worker['total'])}")
    if worker["version"]:
        words.append(f"protocol {worker['version']}")
    if worker["named"]:
        words.append("named in the settings")
    text = "  ".join(words)
    return f"{text}  ({worker['reason']})" if worker["reason"] else text

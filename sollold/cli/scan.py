"""``sollold scan``: find llama.cpp RPC workers on this LAN that are not sollold's."""

from __future__ import annotations

import argparse
from typing import Any

from sollold.cli.asking import client, console, print_json
from sollold.cli.exit import Exit
from sollold.units import bytes_text

_TIMEOUT_SECONDS = 120.0


def scan(options: argparse.Namespace) -> int:
    """Have a node scan, and print the workers found and how to use them."""
    daemon = client(options, timeout=_TIMEOUT_SECONDS)
    found = (daemon.post("/api/cluster/scan", {}))["workers"]
    if options.json:
        print_json(found)
        return Exit.DONE
    if not found:
        print("no worker found on this LAN; start one with `ggml-rpc-server -H ADDRESS` (port 50052)")
        return Exit.DONE
    out = console()
    for worker in found:
        out.print(line(worker), soft_wrap=True)
    free = [worker["address"] for worker in found if worker["state"] == "usable" and not worker["named"]]
    if free:
        names = ", ".join(f'"{address}"' for address in free)
        out.print(
            "\nTo use them, add this to sollold.toml of one node. They are not authenticated or "
            "encrypted: anyone on the network can read and change what they compute.\n"
            f"[llama]\nrpc_backends = [{names}]\nallow_plain_workers = true",
        )
    return Exit.DONE


def line(worker: dict[str, Any]) -> str:
    """A table row for a worker."""
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

"""``sollold admit``, ``invite``, ``join`` and ``cluster``: admission of machines, the cluster's secret."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from sollold.cli.asking import client, print_json, print_result
from sollold.cli.exit import Exit
from sollold.cli.status import of_admission
from sollold.cli.streams import harmless
from sollold.cli.table import print_table
from sollold.units import parse_seconds, seconds_text

_ROLL_SECONDS = 60.0
_MAX_OPEN_SECONDS = 86400.0


def admit(options: argparse.Namespace) -> int:
    """Admit a waiting machine."""
    answer = client(options, timeout=_ROLL_SECONDS).post("/api/cluster/admit", {"machine": options.name})
    return print_result(options, answer, f"{answer['name']} ({answer['code']}) joins within seconds")


def invite(options: argparse.Namespace) -> int:
    """Print an invitation code with which one machine may join."""
    answer = client(options).post("/api/cluster/invite", {})
    return print_result(
        options,
        answer,
        f"on the new machine, within {seconds_text(answer['seconds'])}:",
        f"  sollold join {answer['code']} --seed {answer['seed']}",
    )


def join(options: argparse.Namespace) -> int:
    """Join a cluster with an invitation code."""
    body = {"code": options.code, "seed": options.seed}
    answer = client(options, timeout=_ROLL_SECONDS).post("/api/cluster/join", body)
    return print_result(options, answer, f"joined the cluster of {answer['name']}")


def cluster(options: argparse.Namespace) -> int:
    """Show the members or the authority, admit machines automatically for a while, or change the secret."""
    if options.argument and options.action not in ("open", "evict"):
        print(f"sollold: {options.action} takes no argument", file=sys.stderr)
        return Exit.USAGE
    actions = {"members": _members, "rotate": _rotate, "evict": _evict, "secure": _secure, "ca": _ca}
    return actions.get(options.action, _door)(options)


def _door(options: argparse.Namespace) -> int:
    seconds = 0.0
    if options.action == "open":
        try:
            seconds = parse_seconds(options.argument or "10m")
        except ValueError as error:
            print(f"sollold: {error}", file=sys.stderr)
            return Exit.USAGE
        if not 0 < seconds <= _MAX_OPEN_SECONDS:
            print("sollold: open takes a time up to 24h; `sollold cluster close` ends it", file=sys.stderr)
            return Exit.USAGE
    answer = client(options).post("/api/cluster/door", {"seconds": seconds})
    if options.action == "open":
        text = f"new machines on this LAN are admitted for {seconds_text(seconds)}"
    else:
        text = "new machines now wait for `sollold admit`"
    return print_result(options, answer, text)


def _ca(options: argparse.Namespace) -> int:
    authority = client(options).text("/api/cluster/ca")
    if options.json:
        print_json({"certificate": authority})
    else:
        print(authority, end="")
    return Exit.DONE


def _rotate(options: argparse.Namespace) -> int:
    return _report(options, client(options, timeout=_ROLL_SECONDS).post("/api/cluster/rotate", {}))


def _evict(options: argparse.Namespace) -> int:
    if not options.argument:
        print("sollold: evict needs the name or id of a member", file=sys.stderr)
        return Exit.USAGE
    daemon = client(options, timeout=_ROLL_SECONDS)
    answer = daemon.post("/api/cluster/evict", {"machine": options.argument})
    if not options.json:
        print(harmless(f"{answer['name']} ({answer['node']}) was evicted"))
    status = _report(options, answer)
    if any(node["door_until"] for node in daemon.get("/api/cluster")["nodes"]):
        words = "the cluster still admits new machines, this one too with a new key: sollold cluster close"
        print(words, file=sys.stderr)
    return status


def _secure(options: argparse.Namespace) -> int:
    daemon = client(options, timeout=_ROLL_SECONDS)
    state = daemon.get("/api/cluster")
    if not state["open"]:
        print("sollold: this cluster has a secret; sollold cluster rotate changes it", file=sys.stderr)
        return Exit.FAILED
    nodes = state["nodes"]
    if unknown := set(options.without) - {node[key] for node in nodes for key in ("name", "node")}:
        print(harmless(f"sollold: there is no node {', '.join(sorted(unknown))}"), file=sys.stderr)
        return Exit.FAILED
    kept = [node for node in nodes if not {node["name"], node["node"]} & set(options.without)]
    if not options.yes and not _confirmed(kept):
        print("nothing was changed", file=sys.stderr)
        return Exit.FAILED
    return _report(options, daemon.post("/api/cluster/secure", {"nodes": [node["node"] for node in kept]}))


def _confirmed(nodes: list[dict[str, Any]]) -> bool:
    """List the nodes that will receive the new secret, and ask for confirmation."""
    print("these nodes receive a secret; all others are excluded:", file=sys.stderr)
    for node in nodes:
        words = f"  {node['name']}  {node['node']}  {', '.join(node['addresses'])}"
        print(harmless(words), file=sys.stderr)
    print("Continue? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline().strip().lower() in ("y", "yes")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return False


def _report(options: argparse.Namespace, answer: dict[str, Any]) -> int:
    """Print the result of changing the secret."""
    if options.json:
        print_json(answer)
        return Exit.FAILED if answer["unsure"] else Exit.DONE
    print(harmless(f"new secret on {', '.join(answer['done'])}"))
    if answer["away"]:
        print(harmless(f"offline; they receive it when they return: {', '.join(answer['away'])}"))
    if answer["unsure"]:
        names = ", ".join(answer["unsure"])
        print(harmless(f"did not confirm: {names}. Run `sollold cluster rotate`"), file=sys.stderr)
        return Exit.FAILED
    return Exit.DONE


def _members(options: argparse.Namespace) -> int:
    daemon = client(options)
    state = daemon.get("/api/cluster")
    members = daemon.get("/api/cluster/members")["members"]
    missing = [member for member in members if member["state"] != "here"]
    names = {node["node"]: node["name"] for node in state["nodes"]} | {
        member["node"]: member["name"] for member in members
    }
    if options.json:
        keys = ("node", "name", "admitted_by", "door_until", "waiting", "seeking", "open")
        present = [{**{key: node[key] for key in keys}, "state": "here"} for node in state["nodes"]]
        print_json(present + missing)
        return Exit.DONE
    rows = []
    for node in state["nodes"]:
        admitter = node["admitted_by"]
        origin = (
            f"admitted by {names.get(admitter, admitter)}"
            if admitter
            else "open cluster"
            if node["open"]
            else "founder or token"
        )
        door = ", admits new machines" if node["door_until"] else ""
        # The others' remaining time is by their own clocks, which may differ from this one by hours.
        if node["me"] and node["door_until"] > time.time():
            door += f" for {max(1.0, (node['door_until'] - time.time()) // 60):.0f} min"
        rows.append((node["name"], node["node"], f"{origin}{door}"))
    rows += [(member["name"], member["node"], member["state"]) for member in missing]
    print_table(("member", "id", "how"), rows, whole=("member", "id", "how"))
    for words in of_admission(state):
        print(harmless(words))
    return Exit.DONE

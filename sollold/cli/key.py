"""``sollold key``: API keys of the cluster."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Any

from sollold.cli.asking import client, print_json, print_result
from sollold.cli.exit import Exit
from sollold.cli.streams import harmless
from sollold.cli.table import print_table

PATH = "/api/cluster/keys"


def key(options: argparse.Namespace) -> int:
    """Create, list or revoke."""
    if (options.verb == "list") == bool(options.name):
        usage = "takes no NAME" if options.name else "needs a NAME"
        print(f"sollold: key {options.verb} {usage}", file=sys.stderr)
        return Exit.USAGE
    return {"new": _new, "list": _list, "revoke": _revoke}[options.verb](options)


def _new(options: argparse.Namespace) -> int:
    body = {"name": options.name, "scope": options.scope}
    if options.expires is not None:
        # An empty value, as from an unset variable, must not create a key that never expires.
        body["expires"] = options.expires
    made = client(options).post(PATH, body)
    if options.json:
        print_json(made)
        return Exit.DONE
    print(made["key"])
    if sys.stdout.isatty():
        print(
            "\nThis is the only time the key is shown. Clients send it as `Authorization: Bearer KEY` or "
            "`x-api-key: KEY`,\ncommands of sollold take it from SOLLOLD_API_KEY.",
            file=sys.stderr,
        )
    return Exit.DONE


def _list(options: argparse.Namespace) -> int:
    found = client(options).get(PATH)
    if options.json:
        print_json(found)
        return Exit.DONE
    if options.quiet:
        for entry in found["keys"]:
            if not entry["revoked"]:
                print(harmless(entry["name"]))
        return Exit.DONE
    if not found["keys"]:
        print("no keys yet; `sollold key new NAME` creates one")
        return Exit.DONE
    rows = [(k["name"], k["id"], k["scope"], k["created"][:10], _state(k)) for k in found["keys"]]
    print_table(("name", "id", "scope", "created", "state"), rows, whole=("name",), spare=("created", "id"))
    return Exit.DONE


def _state(entry: dict[str, Any]) -> str:
    if entry["revoked"]:
        return f"revoked {entry['revoked'][:10]}"
    if not entry["expires"]:
        return "never expires"
    expired = datetime.fromisoformat(entry["expires"]) <= datetime.now(UTC)
    return f"{'expired' if expired else 'expires'} {entry['expires'][:16].replace('T', ' ')}"


def _revoke(options: argparse.Namespace) -> int:
    revoked = client(options).delete(PATH, {"name": options.name})
    return print_result(options, revoked, f"revoked {revoked['name']} ({revoked['id']})")

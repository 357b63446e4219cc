"""``sollold token``: the cluster's secret, without which no machine may join."""

from __future__ import annotations

import argparse
import secrets
import sys

from sollold.cli.config import loaded
from sollold.cli.exit import Exit


def token(options: argparse.Namespace) -> int:
    """Print a new secret and how to use it, or the one set as ``cluster.token``."""
    if options.show:
        value = loaded(options).settings.cluster.token
        if not value:
            print(
                "cluster.token is not set: see `sollold cluster members` for who belongs together",
                file=sys.stderr,
            )
            return Exit.FAILED
        print(value)
        return Exit.DONE
    print(secrets.token_hex(32))
    if sys.stdout.isatty():
        print(
            "\nPut it on every machine of the cluster, into /etc/sollold/sollold.toml:\n"
            '  [cluster]\n  token = "…"\n'
            "then `systemctl restart sollold` there. Keep the file readable by root and sollold alone\n"
            "(chown root:sollold, chmod 640): anyone with the secret can join. A daemon refuses to start\n"
            "with a secret in a file that every user of the machine can read.",
            file=sys.stderr,
        )
    return Exit.DONE

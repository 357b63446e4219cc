"""``python -m sollold.client.gateway``: a daemon in the foreground, as ``sollold run`` starts it.

``$RPC_BACKENDS`` (``host:port``, a comma between several) names workers that others started; that it is set
counts as leave to use them, though they are neither proved nor encrypted. Further arguments are those of
``sollold run``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status."""
    from sollold.cli.main import main as command

    given = list(sys.argv[1:] if words is None else words)
    return command(["run", *allowed(os.environ.get("RPC_BACKENDS", "")), *given])


def allowed(backends: str) -> list[str]:
    """The arguments that let the daemon use the workers that are named."""
    return ["--set", "llama.allow_plain_workers=on"] if backends.strip() else []


if __name__ == "__main__":
    sys.exit(main())

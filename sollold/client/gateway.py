"""``python -m sollold.client.gateway``: a daemon in the foreground, as ``sollold run`` starts it.

``$RPC_BACKENDS`` (``host:port``, separated by commas) names external workers; setting it permits their use,
although they are neither authenticated nor encrypted. Further arguments are those of ``sollold run``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status."""
    from sollold.cli.main import main as command

    arguments = list(sys.argv[1:] if words is None else words)
    return command(["run", *allowed(os.environ.get("RPC_BACKENDS", "")), *arguments])


def allowed(backends: str) -> list[str]:
    """Arguments that permit the daemon to use the named workers."""
    return ["--set", "llama.allow_plain_workers=on"] if backends.strip() else []


if __name__ == "__main__":
    sys.exit(main())

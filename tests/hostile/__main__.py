"""``python -m tests.hostile --requests 20000 --connections 1000``: run the sweep, exit 1 on a failure."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.found_llama import found_llama
from tests.hostile.sweep import sweep


def main() -> int:
    """Run the sweep from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    llama, why = found_llama()
    if llama is None:
        print(why)
        return 1
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    print(f"seed {arguments.seed}, logs in {folder}", flush=True)
    outcome = sweep(
        llama, folder, requests=arguments.requests, connected=arguments.connections, seed=arguments.seed
    )
    print("\n".join(outcome.report()))
    if outcome.wrong:
        print(f"the daemons' logs are kept in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

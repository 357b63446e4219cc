"""Run the benchmarks one after another. Each prints a table with a reference measured in the same run.

python -m tests.bench [NAME …]
"""

from __future__ import annotations

import subprocess
import sys
import time

NAMES = (
    "header",
    "planner",
    "footprint",
    "membership",
    "tunnel",
    "decode",
    "callers",
    "speculation",
    "idle",
    "split",
    "relay",
    "access",
    "transfer",
    "load",
    "pool",
    "client",
)


def main() -> int:
    failed = []
    for name in sys.argv[1:] or NAMES:
        print(f"\n=== {name}", flush=True)
        began = time.monotonic()
        if subprocess.run([sys.executable, "-m", f"tests.bench.{name}"], check=False).returncode:
            failed.append(name)
        print(f"({time.monotonic() - began:.0f} s)", flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Random faults on five nodes in namespaces.

After each fault all nodes agree again, and the unaffected ones never lose each other. ``SOLLOLD_TEST_ROUNDS``
and ``SOLLOLD_TEST_SEED`` set the number of rounds and the seed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import netns
from tests.cluster.test_real_network import SETTLED, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(netns.available()), reason=netns.available())]

NODES = 5
ROUNDS = int(os.environ.get("SOLLOLD_TEST_ROUNDS", "4"))
SEED = int(os.environ.get("SOLLOLD_TEST_SEED", "5"))


def fault(cluster: Cluster, kind: str, chance: random.Random) -> set[int]:
    """Cause a fault for some seconds. Returns the numbers of the affected nodes."""
    affected = {chance.randrange(NODES)}
    victim = cluster[min(affected)]
    if kind == "partition":
        affected = set(chance.sample(range(NODES), 2))
        cluster.lan.partition(sorted(affected), [number for number in range(NODES) if number not in affected])
        time.sleep(chance.uniform(1, 8))
        cluster.lan.heal()
    elif kind == "cut":
        victim.machine.cut()
        time.sleep(chance.uniform(1, 8))
        victim.machine.restore()
    elif kind == "kill":
        victim.kill()
        time.sleep(chance.uniform(0, 3))
        victim.start()
    else:
        victim.signal(signal.SIGSTOP)
        time.sleep(chance.uniform(1, 7))
        victim.signal(signal.SIGCONT)
    return affected


@pytest.mark.timeout(ROUNDS * 60)
def test_all_nodes_agree_after_every_fault(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    with netns.Lan(NODES) as lan:
        cluster = Cluster(lan, tmp_path)
        for member in cluster.members:
            member.start()
        cluster.until(cluster.whole, 30)
        kinds = ["partition", "cut", "kill", "stop"]
        for turn in range(ROUNDS):
            kind = kinds[turn % 4]
            # A suspended node stays suspected for a moment; the next fault must come after that.
            time.sleep(SETTLED)
            marks = [len(member.history()) for member in cluster.members]
            affected = fault(cluster, kind, chance)
            cluster.until(cluster.whole, 40)
            unaffected = [number for number in range(NODES) if number not in affected]
            for number in unaffected:
                for other in unaffected:
                    seen = cluster[number].history()[marks[number] :]
                    assert all(f"m{other}" in line.live for line in seen), (
                        f"round {turn} ({kind} of {sorted(affected)}): m{number} lost m{other}"
                    )

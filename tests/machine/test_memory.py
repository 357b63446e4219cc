from __future__ import annotations

from pathlib import Path

import pytest

from sollold.machine.memory import Memory, bounded, held_below, memory

MACHINE = Memory(16_000, 10_000)


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def v2(root: Path, group: str, limit: str, used: int, cached: int = 0) -> None:
    folder = f"sys/fs/cgroup{group}"
    put(root, f"{folder}/memory.max", limit + "\n")
    put(root, f"{folder}/memory.current", f"{used}\n")
    put(root, f"{folder}/memory.stat", f"anon 5\ninactive_file {cached}\nactive_file 0\n")


def test_without_groups_the_machine_counts(tmp_path: Path):
    assert bounded(MACHINE, tmp_path) == MACHINE


def test_v2_bounds_by_the_tightest_group_above(tmp_path: Path):
    put(tmp_path, "proc/self/cgroup", "0::/system.slice/sollold.service\n")
    v2(tmp_path, "/system.slice/sollold.service", "max", 500)
    v2(tmp_path, "/system.slice", "4000", 1500, cached=300)
    assert bounded(MACHINE, tmp_path) == Memory(4000, 4000 - (1500 - 300), barred=7200)


def test_v2_inside_a_container_shows_its_own_group_as_root(tmp_path: Path):
    put(tmp_path, "proc/self/cgroup", "0::/../../docker/abc\n")
    v2(tmp_path, "", "2000", 100)
    assert bounded(MACHINE, tmp_path) == Memory(2000, 1900, barred=8100)


def test_v1_and_its_number_for_no_limit(tmp_path: Path):
    put(tmp_path, "proc/self/cgroup", "7:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n")
    for group, limit in (("a/b", 3000), ("a", 9223372036854771712)):
        put(tmp_path, f"sys/fs/cgroup/memory/{group}/memory.limit_in_bytes", f"{limit}\n")
        put(tmp_path, f"sys/fs/cgroup/memory/{group}/memory.usage_in_bytes", "1000\n")
        put(
            tmp_path,
            f"sys/fs/cgroup/memory/{group}/memory.stat",
            "total_inactive_file 400\ntotal_active_file 100\n",
        )
    assert bounded(MACHINE, tmp_path) == Memory(3000, 2500, barred=7500)


@pytest.mark.parametrize("text", ["", "rubbish", "0::", "4:memory:", "0::/x\n\x00"])
def test_files_that_make_no_sense_bound_nothing(tmp_path: Path, text: str):
    put(tmp_path, "proc/self/cgroup", text)
    put(tmp_path, "sys/fs/cgroup/memory.max", "many")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "")
    assert bounded(MACHINE, tmp_path) == MACHINE


def test_a_group_over_its_limit_has_nothing_free(tmp_path: Path):
    put(tmp_path, "proc/self/cgroup", "0::/g\n")
    v2(tmp_path, "/g", "1000", 1200)
    assert bounded(MACHINE, tmp_path) == Memory(1000, 0, barred=10_000)


@pytest.mark.parametrize(
    ("text", "mapped"), [("MemTotal: 9 kB\nMapped:   20 kB\n", 20480), ("Mapped: x", 0), ("", 0)]
)
def test_what_is_mapped_is_told_apart(tmp_path: Path, text: str, mapped: int):
    put(tmp_path, "proc/meminfo", text)
    assert memory(tmp_path).mapped == mapped


def test_the_real_one_is_sensible():
    real = memory()
    assert 0 < real.free <= real.total


def test_the_limit_of_a_group_is_told_with_what_the_machine_has(tmp_path: Path):
    assert held_below(tmp_path) == (0, 0)
    put(tmp_path, "proc/self/cgroup", "0::/x\n")
    v2(tmp_path, "/x", "4000", 100)
    limit, machine = held_below(tmp_path)
    assert limit == 4000 < machine

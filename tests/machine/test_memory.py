"""Memory of the machine, limited by control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sollold.machine.memory import Memory, bounded, held_below, memory

MACHINE = Memory(16_000, 10_000)


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def put_cgroup_v2(root: Path, group: str, limit: str, used: int, cached: int = 0) -> None:
    """Write the files of a group of cgroup put_cgroup_v2."""
    folder = f"sys/fs/cgroup{group}"
    put(root, f"{folder}/memory.max", limit + "\n")
    put(root, f"{folder}/memory.current", f"{used}\n")
    put(root, f"{folder}/memory.stat", f"anon 5\ninactive_file {cached}\nactive_file 0\n")


def test_without_control_groups_memory_is_not_limited(tmp_path: Path) -> None:
    assert bounded(MACHINE, tmp_path) == MACHINE


def test_the_tightest_cgroup_v2_ancestor_limits_memory(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/system.slice/sollold.service\n")
    put_cgroup_v2(tmp_path, "/system.slice/sollold.service", "max", 500)
    put_cgroup_v2(tmp_path, "/system.slice", "4000", 1500, cached=300)
    assert bounded(MACHINE, tmp_path) == Memory(4000, 4000 - (1500 - 300), barred=7200)


def test_memory_high_limits_memory(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/a\n")
    put_cgroup_v2(tmp_path, "/a", "9000", 500)
    put(tmp_path, "sys/fs/cgroup/a/memory.high", "4000\n")
    assert bounded(MACHINE, tmp_path) == Memory(4000, 3500, barred=6500)
    put(tmp_path, "sys/fs/cgroup/a/memory.high", "max\n")
    assert bounded(MACHINE, tmp_path).total == 9000


def test_a_container_sees_its_own_cgroup_v2_as_the_root(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/../../docker/abc\n")
    put_cgroup_v2(tmp_path, "", "2000", 100)
    assert bounded(MACHINE, tmp_path) == Memory(2000, 1900, barred=8100)


def test_cgroup_v1_limits_memory_unless_unlimited(tmp_path: Path) -> None:
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
def test_invalid_cgroup_files_are_ignored(tmp_path: Path, text: str) -> None:
    put(tmp_path, "proc/self/cgroup", text)
    put(tmp_path, "sys/fs/cgroup/memory.max", "many")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "")
    assert bounded(MACHINE, tmp_path) == MACHINE


def test_a_group_whose_name_is_not_utf_8_limits_memory(tmp_path: Path) -> None:
    name = os.fsdecode(b"/a\xff")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_bytes(b"0::" + os.fsencode(name) + b"\n")
    put_cgroup_v2(tmp_path, name, "2000", 100)
    assert bounded(MACHINE, tmp_path).total == 2000


def test_a_group_above_its_limit_has_no_free_memory(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/g\n")
    put_cgroup_v2(tmp_path, "/g", "1000", 1200)
    assert bounded(MACHINE, tmp_path) == Memory(1000, 0, barred=10_000)


@pytest.mark.parametrize(
    ("text", "mapped"), [("MemTotal: 9 kB\nMapped:   20 kB\n", 20480), ("Mapped: x", 0), ("", 0)]
)
def test_mapped_memory_is_read(tmp_path: Path, text: str, mapped: int) -> None:
    put(tmp_path, "proc/meminfo", text)
    assert memory(tmp_path).mapped == mapped


def test_the_real_memory_is_plausible() -> None:
    real = memory()
    assert 0 < real.free <= real.total


def test_the_limit_of_a_group_is_compared_with_the_machines_memory(tmp_path: Path) -> None:
    assert held_below(tmp_path) == (0, 0)
    put(tmp_path, "proc/self/cgroup", "0::/x\n")
    put_cgroup_v2(tmp_path, "/x", "4000", 100)
    limit, machine = held_below(tmp_path)
    assert limit == 4000 < machine

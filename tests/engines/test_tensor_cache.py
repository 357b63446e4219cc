"""The cache of tensors that workers received."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import MOST_CACHED
from sollold.engines.llamacpp import tensor_cache
from sollold.engines.llamacpp.tensor_cache import TensorCache

ONE, TWO, THREE = "0" * 16, "1" * 16, "2" * 16


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorCache:
    monkeypatch.setattr(tensor_cache, "_SPARE_BYTES", 0)
    return TensorCache(tmp_path / "tensors", 1000)


def load(cache: TensorCache, deployment: str, **files: bytes) -> Path:
    folder = cache.make_folder(deployment, 0)
    assert folder is not None
    for name, data in files.items():
        (folder / "rpc" / name[1:]).write_bytes(data)
    return folder / "rpc"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_tensors_of_a_loaded_deployment_are_available_to_the_next(cache: TensorCache) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 10})
    cache.keep("a")
    cache.remove_folder("a")
    assert names(load(cache, "b")) == [ONE]


def test_tensors_of_an_aborted_load_are_discarded(cache: TensorCache) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 10})
    cache.remove_folder("a")
    assert names(load(cache, "b")) == []
    cache.remove_leftovers()
    assert names(load(cache, "c")) == []


@pytest.mark.parametrize("harm", ["truncate", "write", "extra"])
def test_changed_files_are_discarded(cache: TensorCache, tmp_path: Path, harm: str) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 10, "_" + TWO: b"y" * 10})
    cache.keep("a")
    whole = tmp_path / "tensors/whole"
    match harm:
        case "truncate":
            os.truncate(whole / ONE, 5)
        case "write":
            (whole / ONE).write_bytes(b"z" * 10)
        case "extra":
            (whole / THREE).write_bytes(b"never taken over")
    expected = [ONE, TWO] if harm == "extra" else [TWO]
    assert names(load(cache, "b")) == expected
    assert names(whole) == expected


def test_the_least_recently_read_files_are_evicted_at_the_limit(cache: TensorCache, tmp_path: Path) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 400, "_" + TWO: b"x" * 400})
    cache.keep("a")
    whole = tmp_path / "tensors/whole"
    old = (whole / ONE).stat()
    os.utime(whole / TWO, ns=(old.st_atime_ns + 10**12, (whole / TWO).stat().st_mtime_ns))
    folder = load(cache, "b", **{"_" + THREE: b"x" * 400})
    os.utime(folder / THREE, ns=(old.st_atime_ns + 10**13,) * 2)
    cache.keep("b")
    assert names(whole) == [TWO, THREE]


def test_files_with_other_names_and_empty_files_are_not_kept(cache: TensorCache) -> None:
    load(cache, "a", _readme=b"x", **{"_" + ONE: b""})
    cache.keep("a")
    assert names(load(cache, "b")) == []


def test_a_full_disk_means_no_cache(tmp_path: Path) -> None:
    assert TensorCache(tmp_path, 1000).make_folder("a", 1 << 60) is None
    assert not (tmp_path / "work/a").exists()


def test_a_folder_that_can_not_be_written_means_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = TensorCache(tmp_path / "file", 1000)
    assert cache.make_folder("a", 1) is None
    cache.keep("a")
    cache.remove_folder("a")


def test_a_broken_index_forgets_the_files(cache: TensorCache, tmp_path: Path) -> None:
    load(cache, "a", **{"_" + ONE: b"x"})
    cache.keep("a")
    (tmp_path / "tensors/whole.json").write_text("[")
    assert names(load(cache, "b")) == []


def test_a_cache_emptied_by_the_user_is_filled_again(cache: TensorCache, tmp_path: Path) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 10})
    cache.keep("a")
    load(cache, "b", **{"_" + TWO: b"y" * 10})
    shutil.rmtree(tmp_path / "tensors/whole")
    cache.keep("b")
    assert names(load(cache, "c")) == [ONE, TWO]


def test_a_file_changed_during_a_deployment_is_discarded(cache: TensorCache, tmp_path: Path) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 10})
    cache.keep("a")
    load(cache, "b")
    os.truncate(tmp_path / "tensors/whole" / ONE, 5)
    cache.keep("b")
    assert names(load(cache, "c")) == []


def test_the_cached_bytes_of_each_model_are_listed(cache: TensorCache) -> None:
    assert cache.models() == ()
    load(cache, "a", **{"_" + ONE: b"x" * 10, "_" + TWO: b"y" * 20})
    cache.keep("a", "d1" * 32)
    cache.remove_folder("a")
    # Files that exist already count for the first model; only new files count for the second.
    folder = load(cache, "b", **{"_" + THREE: b"z" * 40})
    os.utime(folder / THREE, (2e9, 2e9))
    cache.keep("b", "d2" * 32)
    cache.remove_folder("b")
    assert cache.models() == (("d2" * 8, 40), ("d1" * 8, 30))
    assert names(load(cache, "c")) == [ONE, TWO, THREE]


def test_the_list_of_cached_models_is_limited(cache: TensorCache) -> None:
    for number in range(20):
        load(cache, f"d{number}", **{f"_{number:016x}": b"x"})
        cache.keep(f"d{number}", f"{number:02}" * 32)
        cache.remove_folder(f"d{number}")
    assert len(cache.models()) == MOST_CACHED


def test_a_file_that_a_worker_wrote_only_in_part_is_not_kept(cache: TensorCache, tmp_path: Path) -> None:
    """Workers do not report a full disk; by the end of the load there may be space again."""
    folder = load(cache, "a")
    for name in (ONE, TWO):
        assert cache.place("a", name, f"tensor {name}", 10, None) == 0
    (folder / ONE).write_bytes(b"x" * 10)
    (folder / TWO).write_bytes(b"y" * 4)
    cache.keep("a", "model")
    assert names(tmp_path / "tensors/whole") == [ONE]


def test_an_incomplete_file_is_not_offered_for_a_tensor(cache: TensorCache, tmp_path: Path) -> None:
    load(cache, "a", **{"_" + ONE: b"x" * 4})
    cache.keep("a")
    folder = load(cache, "b")
    assert names(folder) == [ONE]
    assert cache.place("b", ONE, "tensor", 10, None) == 0
    assert names(folder) == []
    (folder / ONE).write_bytes(b"x" * 10)
    cache.keep("b")
    assert (tmp_path / "tensors/whole" / ONE).read_bytes() == b"x" * 10


_OTHER = """
import sys
from pathlib import Path
from sollold.engines.llamacpp.tensor_cache import TensorCache

cache = TensorCache(Path(sys.argv[1]), 1000)
cache.remove_leftovers()
print("ready", flush=True)
sys.stdin.read()
"""


def test_only_one_of_two_daemons_uses_the_cache(cache: TensorCache, tmp_path: Path) -> None:
    folder = tmp_path / "tensors"
    command = [sys.executable, "-c", _OTHER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        working = folder / "work/of-the-other"
        working.mkdir(parents=True)
        cache.remove_leftovers()
        assert working.is_dir()
        assert cache.make_folder("a", 0) is None
        assert cache.models() == ()
        other.stdin.close()
    assert cache.make_folder("a", 0) is not None
    assert not working.exists()

"""Models in plain folders, in llama.cpp's cache and in Hugging Face's cache."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from sollold.models.stores import folders, huggingface_cache
from sollold.models.stores.scan_result import Scan
from sollold.models.stores.shards import group, is_projector
from tests.models.stores import hub_file, hub_repository, shut


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF")
    return path


def names(scan: Scan) -> list[str]:
    return sorted(found.name for found in scan.found)


def test_gguf_files_are_found_in_nested_folders(tmp_path: Path) -> None:
    touch(tmp_path / "Tiny-Q4_K_M.gguf")
    touch(tmp_path / "deep" / "er" / "other.GGUF")
    touch(tmp_path / ".hidden.gguf")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder.gguf").mkdir()
    assert names(folders.scan_folder(tmp_path)) == ["Tiny:Q4_K_M", "other:latest"]


def test_cyclic_links_end_the_search(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "m.gguf")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names(folders.scan_folder(tmp_path)) == ["m:latest"]


@pytest.mark.parametrize("limit", ["_MAX_FILES", "_MAX_FOLDERS"])
def test_exceeding_a_limit_of_the_search_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    for number in range(5):
        touch(tmp_path / f"f{number}" / "a.gguf")
    assert len(folders.scan_folder(tmp_path).found) == 5
    assert folders.scan_folder(tmp_path).problems == []
    monkeypatch.setattr(folders, limit, 3)
    scan = folders.scan_folder(tmp_path)
    assert 2 <= len(scan.found) <= 3
    assert [str(tmp_path) in problem.what for problem in scan.problems] == [True]


def test_too_many_files_in_one_folder_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        touch(tmp_path / f"{number}.gguf")
    monkeypatch.setattr(folders, "_MAX_FILES", 3)
    scan = folders.scan_folder(tmp_path)
    assert (len(scan.found), len(scan.problems)) == (3, 1)
    monkeypatch.setattr(folders, "_MAX_FILES", 4)
    assert folders.scan_folder(tmp_path).problems == []


def test_a_missing_folder_of_the_settings_is_a_problem_until_it_exists(tmp_path: Path) -> None:
    scan = folders.scan_folder(tmp_path / "models")
    (problem,) = scan.problems
    assert f"{tmp_path}/models (models.folders) does not exist" in problem.what and "mount it" in problem.fix
    (tmp_path / "models").mkdir()
    assert scan.changed() and not folders.scan_folder(tmp_path / "models").problems


def test_an_unreadable_folder_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("os.scandir", fails)
    (problem,) = folders.scan_folder(tmp_path).problems
    assert "Input/output error" in problem.what


def test_shards_are_one_model(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        touch(tmp_path / f"Big-Q8_0-0000{number}-of-00003.gguf")
    (found,) = folders.scan_folder(tmp_path).found
    assert found.name == "Big:Q8_0"
    assert [Path(file).name[-19:-14] for file in found.files] == ["00001", "00002", "00003"]
    assert found.unusable == ""


def test_missing_shards_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "Big-00002-of-00004.gguf")
    (found,) = folders.scan_folder(tmp_path).found
    assert found.unusable.startswith("Shards 1, 3, 4 of 4 are missing")


def test_the_fault_of_an_absurd_shard_count_is_short() -> None:
    (shard_group,) = group([Path("/x/a-00001-of-99999.gguf")])
    assert len(shard_group.fault) < 300


def test_a_projector_belongs_to_all_files_of_the_only_model(tmp_path: Path) -> None:
    touch(tmp_path / "gemma-3-4b-it-Q4_K_M.gguf")
    touch(tmp_path / "gemma-3-4b-it-Q8_0.gguf")
    touch(tmp_path / "mmproj-BF16.gguf")
    touch(tmp_path / "mmproj-F16.gguf")
    scan = folders.scan_folder(tmp_path)
    assert names(scan) == ["gemma-3-4b-it:Q4_K_M", "gemma-3-4b-it:Q8_0"]
    assert {found.projector for found in scan.found} == {str(tmp_path / "mmproj-F16.gguf")}


def test_a_projector_belongs_to_the_model_with_its_name(tmp_path: Path) -> None:
    touch(tmp_path / "llava-Q4_0.gguf")
    touch(tmp_path / "plain-Q4_0.gguf")
    touch(tmp_path / "llava-mmproj-f16.gguf")
    projectors = {found.name: found.projector for found in folders.scan_folder(tmp_path).found}
    assert projectors == {"llava:Q4_0": str(tmp_path / "llava-mmproj-f16.gguf"), "plain:Q4_0": ""}


def test_projector_names() -> None:
    assert is_projector("mmproj-model-f16.gguf")
    assert is_projector("llava.mmproj.gguf")
    assert not is_projector("commproject.gguf")


def test_names_of_files_in_llama_cpps_cache(tmp_path: Path) -> None:
    touch(tmp_path / "ggml-org_gemma-3-4b-it-GGUF_gemma-3-4b-it-Q4_K_M.gguf")
    touch(tmp_path / "other.gguf")
    scan = folders.scan_llama_cache(tmp_path)
    assert names(scan) == ["hf.co/ggml-org/gemma-3-4b-it-GGUF:Q4_K_M", "other:latest"]


def test_the_location_of_llama_cpps_cache(tmp_path: Path) -> None:
    assert folders.llama_cache({"LLAMA_CACHE": "/x"}, tmp_path) == Path("/x")
    assert folders.llama_cache({"XDG_CACHE_HOME": "/c"}, tmp_path) == Path("/c/llama.cpp")
    assert folders.llama_cache({}, tmp_path) == tmp_path / ".cache" / "llama.cpp"


CARD: dict[str, Any] = {
    "name": "mario:latest",
    "digest": "d",
    "source": "own",
    "files": [],
    "size": 1,
    "modified": 5.0,
}


def test_models_of_the_own_folder_with_and_without_a_card(tmp_path: Path) -> None:
    touch(tmp_path / "x" / "model.gguf")
    (tmp_path / "x" / folders.CARD).write_text(json.dumps(CARD | {"system": "You are Mario."}))
    touch(tmp_path / "dropped.gguf")
    touch(tmp_path / "demo.gguf")
    found = {model.name: model for model in folders.scan_own(tmp_path).found}
    assert found["mario:latest"].system == "You are Mario."
    assert found["mario:latest"].source == "own"
    assert found["dropped:latest"].source == "folder"
    assert found["demo:latest"].source == "demo"


@pytest.mark.parametrize(
    "card", [b"{", b'"\xff"', b'{"x":' + b"[" * 5000, json.dumps(CARD | {"adapters": ["a\0b"]}).encode()]
)
def test_a_damaged_card_is_ignored(tmp_path: Path, card: bytes) -> None:
    touch(tmp_path / "x" / "model-Q4_0.gguf")
    (tmp_path / "x" / folders.CARD).write_bytes(card)
    (found,) = folders.scan_own(tmp_path).found
    assert (found.name, found.source) == ("model:Q4_0", "folder")


def test_models_of_the_hub_cache(tmp_path: Path) -> None:
    snapshot = hub_repository(tmp_path, "bartowski/Tiny-GGUF")
    hub_file(snapshot, "Tiny-Q4_K_M.gguf", b"GGUF1")
    hub_file(snapshot, "Tiny-Q8_0/Tiny-Q8_0-00001-of-00002.gguf", b"GGUF2")
    hub_file(snapshot, "Tiny-Q8_0/Tiny-Q8_0-00002-of-00002.gguf", b"GGUF3")
    hub_file(snapshot, "mmproj-F16.gguf", b"GGUF4")
    hub_file(snapshot, "README.md", b"x")
    scan = huggingface_cache.scan(tmp_path)
    found = {model.name: model for model in scan.found}
    assert set(found) == {"hf.co/bartowski/Tiny-GGUF:Q4_K_M", "hf.co/bartowski/Tiny-GGUF:Q8_0"}
    sharded = found["hf.co/bartowski/Tiny-GGUF:Q8_0"]
    assert len(sharded.files) == 2
    assert all("/snapshots/" in file for file in sharded.files)
    assert sharded.projector == str(snapshot / "mmproj-F16.gguf")


def test_the_main_snapshot_of_the_hub_cache_takes_precedence(tmp_path: Path) -> None:
    main = hub_repository(tmp_path, "o/r", "aaaa")
    other = main.parent / "bbbb"
    other.mkdir()
    hub_file(main, "m-Q4_0.gguf", b"GGUF1")
    hub_file(other, "m-Q4_0.gguf", b"GGUF2")
    hub_file(other, "m-Q8_0.gguf", b"GGUF3")
    found = {model.name: model.files[0] for model in huggingface_cache.scan(tmp_path).found}
    assert found == {
        "hf.co/o/r:Q4_0": str(main / "m-Q4_0.gguf"),
        "hf.co/o/r:Q8_0": str(other / "m-Q8_0.gguf"),
    }


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_unreadable_folder_of_the_hub_cache_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    root = tmp_path / "hub"
    hub_file(hub_repository(root, "org/fine"), "a.gguf", b"GGUF")
    snapshot = hub_repository(root, "org/closed")
    hub_file(snapshot, "b.gguf", b"GGUF")
    closed = (snapshot, snapshot.parent, snapshot.parents[1])[level]
    shut(monkeypatch, closed)
    scan = huggingface_cache.scan(root)
    assert [model.name for model in scan.found] == ["hf.co/org/fine:latest"]
    (problem,) = scan.problems
    assert str(closed) in problem.what
    assert str(closed) in problem.fix


def test_the_location_of_the_hub_cache(tmp_path: Path) -> None:
    assert huggingface_cache.caches({"HF_HUB_CACHE": "/x", "HF_HOME": "/y"}, tmp_path) == (Path("/x"),)
    assert huggingface_cache.caches({"HF_HOME": "/y"}, tmp_path) == (Path("/y/hub"),)
    assert huggingface_cache.caches({}, tmp_path) == (tmp_path / ".cache/huggingface/hub",)


def test_a_folder_that_became_readable_counts_as_changed(tmp_path: Path) -> None:
    """As after the chmod command that doctor shows, which does not change the modification time."""
    folder = tmp_path / "models"
    folder.mkdir()
    folder.chmod(0)
    found = folders.scan_folder(folder)
    assert not found.changed()
    folder.chmod(0o755)
    assert found.changed()

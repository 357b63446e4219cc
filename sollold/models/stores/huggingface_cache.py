"""Scans Hugging Face's hub cache: ``models--org--repo/{refs, blobs, snapshots/<commit>/<path>}``.

The snapshots' paths are used, since blobs have no file names. llama.cpp's ``-hf`` keeps its files here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sollold.models.names import of_file, quantization_in
from sollold.models.stores.permission_hint import permission_hint
from sollold.models.stores.scan_result import Problem, Scan
from sollold.models.stores.shards import ShardedFile, group
from sollold.settings.location import cache_home, expanded


def caches(environ: Mapping[str, str], home: Path) -> tuple[Path, ...]:
    """Return the hub's cache according to the first environment variable that is set, or the default."""
    for key, rest in (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub")):
        if value := environ.get(key):
            return (expanded(value) / rest,)
    return (cache_home(environ, home) / "huggingface" / "hub",)


def scan(root: Path) -> Scan:
    """Scan one cache for GGUF models. A missing cache gives none and is watched for."""
    result = Scan()
    result.see(root)
    try:
        repositories = sorted(path for path in root.iterdir() if path.name.startswith("models--"))
    except PermissionError:
        _add_problem(root, root, result)
        return result
    except OSError:
        return result
    for repository in repositories:
        parts = repository.name.split("--", 2)
        if len(parts) == 3:
            _repository(root, repository, f"hf.co/{parts[1]}/{parts[2]}", result)
    return result


def _add_problem(folder: Path, root: Path, result: Scan) -> None:
    problem = f"The folder {folder} of a Hugging Face cache can't be read; its models are not listed."
    result.problems.append(Problem(problem, permission_hint(folder, root)))


def _repository(root: Path, folder: Path, name: str, result: Scan) -> None:
    seen: set[str] = set()
    tags: set[str] = set()

    def fault(error: OSError) -> None:
        if isinstance(error, PermissionError):
            _add_problem(Path(error.filename), root, result)

    for snapshot in _snapshots(root, folder, result):
        by_folder: dict[Path, list[Path]] = {}
        for directory, folders, names in os.walk(snapshot, onerror=fault):
            folders.sort()
            result.see(directory)
            for file in names:
                path = Path(directory, file)
                relative = str(path.relative_to(snapshot))
                if file.lower().endswith(".gguf") and relative not in seen:
                    seen.add(relative)
                    by_folder.setdefault(path.parent, []).append(path)
        top = by_folder.get(snapshot, [])
        for parent, files in sorted(by_folder.items()):
            # Quantizations in separate folders share the projector at the top.
            shared = [path for path in top if parent != snapshot and "mmproj" in path.name.lower()]
            for model in group([*files, *shared]):
                result.see_files(model.files, model.projector)
                tag = _tag(model, parent, snapshot)
                if tag.lower() in tags:
                    tag = of_file(model.stem)[0]
                tags.add(tag.lower())
                result.found.append(model.found(f"{name}:{tag}", "huggingface"))


def _snapshots(root: Path, folder: Path, result: Scan) -> list[Path]:
    """Return the snapshots: the one that ``main`` refers to, then the others from newest to oldest."""
    result.see(folder / "refs")
    result.see(folder / "refs" / "main")
    result.see(folder / "snapshots")
    try:
        main = (folder / "refs" / "main").read_text("ascii", "replace").strip()
    except OSError:
        main = ""
    try:
        snapshots = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
        return sorted(snapshots, key=lambda path: (path.name != main, -path.stat().st_mtime, path.name))
    except PermissionError as error:
        _add_problem(Path(error.filename), root, result)
    except OSError:
        pass
    return []


def _tag(model: ShardedFile, parent: Path, snapshot: Path) -> str:
    """Return the quantization in the file's name, or else in its folder's."""
    tag = quantization_in(model.stem)
    if not tag and parent != snapshot:
        tag = quantization_in(parent.name)
    return tag or "latest"

"""Scans plain folders: those of the settings, llama.cpp's older cache, and the folder for pulled models.

A folder filled by a pull has `CARD` beside the files: name, template and other facts as they were at the
source. Only such folders are ever removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sollold.errors import system_reason
from sollold.models.model import Model
from sollold.models.names import is_name, of_file
from sollold.models.stores.permission_hint import permission_hint
from sollold.models.stores.safe_read import open_file
from sollold.models.stores.scan_result import FoundModel, Problem, Scan
from sollold.models.stores.shards import ShardedFile, group
from sollold.settings.location import cache_home
from sollold.undecodable import UNDECODABLE

CARD = "sollold.json"
_DEPTH = 5
_MAX_FILES = 20_000
_MAX_FOLDERS = 20_000
_MAX_CARD_BYTES = 64 << 20
_OLD_CACHE = re.compile(r"(?P<org>[^_/]+)_(?P<repo>.+?-GGUF)_(?P<stem>.+)", re.IGNORECASE)


def llama_cache(environ: Mapping[str, str], home: Path) -> Path:
    """Return the cache that llama.cpp used before it shared Hugging Face's."""
    if value := environ.get("LLAMA_CACHE"):
        return Path(value)
    return cache_home(environ, home) / "llama.cpp"


def scan_folder(root: Path) -> Scan:
    """Scan a folder of the settings, five levels in all. A missing one is a problem, and watched for."""
    result = Scan()
    for _, files in _walk(root, result):
        for model in group(files):
            result.see_files(model.files, model.projector)
            base, tag = of_file(model.stem)
            result.found.append(model.found(f"{base}:{tag}", "folder"))
    if not result.problems and not os.path.isdir(root):  # noqa: PTH112 (Path.is_dir may raise)
        fix = "create or mount it, or correct models.folders in sollold.toml"
        result.problems.append(Problem(f"The folder {root} (models.folders) does not exist.", fix))
    return result


def scan_llama_cache(root: Path) -> Scan:
    """Scan llama.cpp's older cache; names are ``hf.co/org/repo:quantization`` if the file name has these."""
    result = Scan()
    for _, files in _walk(root, result, depth=1):
        for model in group(files):
            result.see_files(model.files, model.projector)
            match = _OLD_CACHE.fullmatch(model.stem)
            base, tag = of_file(match["stem"] if match else model.stem)
            name = f"hf.co/{match['org']}/{match['repo']}:{tag}" if match else f"{base}:{tag}"
            result.found.append(model.found(name, "llama.cpp"))
    return result


def scan_own(root: Path, demo: str = "demo") -> Scan:
    """Scan the folder for pulled models: those with a card, the demo model, and plain files."""
    result = Scan()
    for folder, files in _walk(root, result):
        card = read_card(folder, result)
        if card is not None:
            result.found += _of_card(folder, files, card, result)
            # A user may have put other models there.
            files = [path for path in files if card.files and path.name not in card.files]
        for model in group(files):
            result.see_files(model.files, model.projector)
            if folder == root and model.stem == demo:
                result.found.append(model.found(f"{demo}:latest", "demo"))
            else:
                base, tag = of_file(model.stem)
                result.found.append(model.found(f"{base}:{tag}", "folder"))
    return result


def read_card(folder: Path, result: Scan | None = None) -> Model | None:
    """Return the facts stored beside a pulled model's files; None if missing or if a name is invalid."""
    path = folder / CARD
    try:
        with open_file(path) as file:
            raw = file.read(_MAX_CARD_BYTES)
    except OSError:
        return None
    if result is not None:
        result.see(path)
    try:
        card = msgspec.json.decode(raw, type=Model)
    except UNDECODABLE:
        return None
    return card if is_name(card.name) and "\0" not in "".join(card.adapters) else None


def _of_card(folder: Path, files: list[Path], card: Model, result: Scan) -> list[FoundModel]:
    """Return the pulled model in a folder; cards of earlier releases do not name the files."""
    adapters = {Path(path).name for path in card.adapters}
    fetched = [
        path for path in files if path.name not in adapters and path.name in (card.files or (path.name,))
    ]
    present = {path.name for path in files}
    missing = sorted({*card.files, *adapters} - present)
    found = []
    for model in group(fetched):
        result.see_files(model.files, model.projector)
        fault = model.fault
        if missing and not fault:
            fault = f"{', '.join(missing)} of the model is missing in {folder}. Pull it again."
        found.append(_from_card(model, card, fault))
    return found


def _from_card(model: ShardedFile, card: Model, fault: str) -> FoundModel:
    return FoundModel(
        card.name,
        "own",
        files=tuple(map(str, model.files)),
        projector=str(model.projector or ""),
        adapters=tuple(str(model.files[0].parent / Path(path).name) for path in card.adapters),
        modified=card.modified,
        template=card.template,
        system=card.system,
        messages=card.messages,
        params=card.params,
        license=card.license,
        manifest=card.manifest,
        named=card.named,
        # A download from the internet is identified by its version.
        version=card.version or card.digest,
        unusable=fault,
    )


def _walk(root: Path, result: Scan, depth: int = _DEPTH) -> Iterator[tuple[Path, list[Path]]]:
    """Yield each folder under ``root`` that has GGUF files, with them. Symlinks are followed, cycles not."""
    seen: set[str] = set()
    remaining = _MAX_FILES
    folders = [(root, 0)]
    while folders:
        folder, level = folders.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        result.see(folder)
        files: list[Path] = []
        for path, is_folder in _readable(folder, root, result):
            if is_folder and level + 1 < depth:
                folders.append((path, level + 1))
            elif not is_folder:
                remaining -= 1
                if remaining < 0:
                    break
                files.append(path)
        if files:
            yield folder, files
        if remaining < 0 or (folders and len(seen) >= _MAX_FOLDERS):
            limits = f"{_MAX_FILES} models or {_MAX_FOLDERS} folders"
            problem = f"There are more than {limits} in {root}, and the rest is ignored"
            result.problems.append(Problem(f"{problem}: name the folders in it that hold models instead."))
            return


def _readable(folder: Path, root: Path, result: Scan) -> Iterator[tuple[Path, bool]]:
    """Yield the entries of ``folder`` as `_entries` does; if it can't be read, add a problem to the scan."""
    try:
        yield from _entries(folder)
    except PermissionError:
        result.problems.append(Problem(f"The folder {folder} can't be read.", permission_hint(folder, root)))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        result.problems.append(Problem(f"The folder {folder} can't be read: {system_reason(error)}."))


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the subfolders and GGUF files of a folder, and whether each is a folder; omit hidden ones."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_folder = _is_dir(entry)
            if is_folder or entry.name.lower().endswith(".gguf"):
                yield Path(entry.path), is_folder


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False

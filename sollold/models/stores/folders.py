"""Models in plain folders: those of the settings, llama.cpp's older cache, and what we fetched ourselves.

A folder that we filled has `CARD` beside the files: name, template and the rest as the model had them
where it came from. Only such folders are ever removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from sollold.models.model import Model
from sollold.models.names import is_name, of_file
from sollold.models.stores.permission_hint import permission_hint
from sollold.models.stores.safe_read import UNDECODABLE, open_file
from sollold.models.stores.scan_result import FoundModel, Problem, Scan
from sollold.models.stores.shards import ShardedFile, group
from sollold.settings.location import home_folder

CARD = "sollold.json"
_DEPTH = 5
_MOST_FILES = 20_000
_MOST_FOLDERS = 20_000
_MOST_CARD = 64 << 20
_OLD_CACHE = re.compile(r"(?P<org>[^_/]+)_(?P<repo>.+?-GGUF)_(?P<stem>.+)", re.IGNORECASE)


def llama_cache(environ: Mapping[str, str] | None = None, home: Path | None = None) -> Path:
    """Where llama.cpp kept what it downloaded before it shared Hugging Face's cache."""
    environ = os.environ if environ is None else environ
    home = home_folder() if home is None else home
    if given := environ.get("LLAMA_CACHE"):
        return Path(given)
    base = Path(environ["XDG_CACHE_HOME"]) if environ.get("XDG_CACHE_HOME") else home / ".cache"
    return base / "llama.cpp"


def scan_folder(root: Path) -> Scan:
    """Models of a folder and the folders in it, five levels down. A missing one is watched for."""
    result = Scan()
    for _, files in _walk(root, result):
        for found in group(files):
            result.see_files(found.files, found.projector)
            base, tag = of_file(found.stem)
            result.found.append(found.found(f"{base}:{tag}", "folder"))
    return result


def scan_llama_cache(root: Path) -> Scan:
    """Models of llama.cpp's older cache, named ``hf.co/org/repo:quantization`` where the file tells."""
    result = Scan()
    for _, files in _walk(root, result, depth=1):
        for found in group(files):
            result.see_files(found.files, found.projector)
            match = _OLD_CACHE.fullmatch(found.stem)
            base, tag = of_file(match["stem"] if match else found.stem)
            name = f"hf.co/{match['org']}/{match['repo']}:{tag}" if match else f"{base}:{tag}"
            result.found.append(found.found(name, "llama.cpp"))
    return result


def scan_own(root: Path, demo: str = "demo") -> Scan:
    """Models in our own folder: those we fetched (with a card), the demo model, and plain files."""
    result = Scan()
    for folder, files in _walk(root, result):
        card = read_card(folder, result)
        if card is not None:
            files = [path for path in files if path.name not in card.adapters]
        for found in group(files):
            result.see_files(found.files, found.projector)
            if card is not None:
                result.found.append(_carded(found, card))
            elif folder == root and found.stem == demo:
                result.found.append(found.found(f"{demo}:latest", "demo"))
            else:
                base, tag = of_file(found.stem)
                result.found.append(found.found(f"{base}:{tag}", "folder"))
    return result


def read_card(folder: Path, result: Scan | None = None) -> Model | None:
    """The model's facts that we wrote beside its files; None when there are none, or they name no model."""
    path = folder / CARD
    try:
        with open_file(path) as file:
            raw = file.read(_MOST_CARD)
    except OSError:
        return None
    if result is not None:
        result.see(path)
    try:
        card = msgspec.json.decode(raw, type=Model)
    except UNDECODABLE:
        return None
    return card if is_name(card.name) else None


def _carded(found: ShardedFile, card: Model) -> FoundModel:
    return FoundModel(
        card.name,
        "own",
        files=tuple(map(str, found.files)),
        projector=str(found.projector or ""),
        adapters=tuple(str(found.files[0].parent / Path(path).name) for path in card.adapters),
        modified=card.modified,
        template=card.template,
        system=card.system,
        messages=card.messages,
        params=card.params,
        license=card.license,
        manifest=card.manifest,
        unusable=found.fault,
    )


def _walk(root: Path, result: Scan, depth: int = _DEPTH) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder under ``root`` that has GGUF files, with them. Links are followed, circles are not."""
    seen: set[str] = set()
    left = _MOST_FILES
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
                left -= 1
                if left < 0:
                    break
                files.append(path)
        if files:
            yield folder, files
        if left < 0 or (folders and len(seen) >= _MOST_FOLDERS):
            counts = f"{_MOST_FILES} models or {_MOST_FOLDERS} folders"
            what = f"There are more than {counts} in {root}, and the rest is ignored"
            result.problems.append(Problem(f"{what}: name the folders in it that hold models instead."))
            return


def _readable(folder: Path, root: Path, result: Scan) -> Iterator[tuple[Path, bool]]:
    """The entries of ``folder``, as `_entries`; where it can't be read that is a problem of the scan."""
    try:
        yield from _entries(folder)
    except PermissionError:
        result.problems.append(Problem(f"The folder {folder} can't be read.", permission_hint(folder, root)))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        result.problems.append(Problem(f"The folder {folder} can't be read: {error.strerror}."))


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """The folders and the GGUF files in a folder, and whether each is a folder; hidden ones left out."""
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

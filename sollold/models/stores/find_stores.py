"""Finds the stores of models on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from sollold.models.stores import folders, huggingface_cache, ollama_store
from sollold.models.stores.scan_result import Scan
from sollold.settings.location import expanded
from sollold.settings.schema import ModelSettings


def find_stores(
    settings: ModelSettings,
    own: Path,
    scan_own: Callable[[], Scan],
    environ: Mapping[str, str],
    home: Path,
) -> dict[str, tuple[str, Callable[[], Scan]]]:
    """Return all stores with path and scan function, in order of precedence of their names. Blocks.

    ``own``: the folder for pulled models, which ``scan_own`` scans.
    """
    found: dict[str, tuple[str, Callable[[], Scan]]] = {}

    def add(kind: str, path: Path, scan: Callable[[], Scan]) -> None:
        found.setdefault(f"{kind} {path}", (str(path), scan))

    for root in ollama_store.roots(settings.ollama_stores, environ=environ, home=home):
        add("ollama", root, partial(ollama_store.scan, root))
    add("own", own, scan_own)
    for path in map(expanded, settings.folders):
        add("folder", path, partial(folders.scan_folder, path))
    if settings.huggingface:
        for cache in huggingface_cache.caches(environ, home):
            add("hub", cache, partial(huggingface_cache.scan, cache))
        cache = folders.llama_cache(environ, home)
        add("llama.cpp", cache, partial(folders.scan_llama_cache, cache))
    return found

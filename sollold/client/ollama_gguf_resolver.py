"""Finds a model's GGUF file in Ollama's store, with the daemon's reader of that store. Read-only."""

from __future__ import annotations

import os
from pathlib import Path


class OllamaGGUFResolver:
    """Finds models in Ollama's stores of this machine.

    Args:
        ollama_models_dir: the store (the folder with ``manifests`` and ``blobs``); default: as given by
            Ollama's unit, ``$OLLAMA_MODELS``, or the usual home folders.
    """

    def __init__(self, ollama_models_dir: str | Path | None = None) -> None:
        self._configured = () if ollama_models_dir is None else (str(ollama_models_dir),)

    def get_gguf_path(self, model_name: str) -> str | None:
        """The path of the model's GGUF file (the first if split), or None if no store has it whole.

        Raises:
            PermissionError: a store has it, but this user can't read the file.
        """
        from sollold.models.names import resolve

        found = self._found()
        name = resolve(model_name, found).name
        if not name:
            return None
        files, unusable = found[name]
        if _readable(files):
            return files[0]
        if unusable and not _missing(files):
            raise PermissionError(unusable)
        return None

    resolve = get_gguf_path

    def list_available_models(self) -> dict[str, str]:
        """Models with readable files: name → path of the first file."""
        return {name: files[0] for name, (files, _) in sorted(self._found().items()) if _readable(files)}

    def _found(self) -> dict[str, tuple[tuple[str, ...], str]]:
        from sollold.models.stores import ollama_store

        found: dict[str, tuple[tuple[str, ...], str]] = {}
        for root in ollama_store.roots(self._configured):
            for model in ollama_store.scan(root).found:
                if model.format == "gguf":
                    found.setdefault(model.name, (model.files, model.unusable))
        return found


def _readable(files: tuple[str, ...]) -> bool:
    return bool(files) and all(os.access(file, os.R_OK) for file in files)


def _missing(files: tuple[str, ...]) -> bool:
    """Whether a file does not exist; False if its folder may not be entered."""
    for file in files:
        try:
            Path(file).stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False
    return False

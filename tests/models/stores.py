"""Model stores in the layouts of Ollama and Hugging Face, with small GGUF files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sollold.models.gguf import writer
from sollold.models.gguf.writer import NewTensor

KIND = "application/vnd.ollama.image."


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
    tensors: Sequence[str] = ("token_embd.weight", "blk.0.attn_q.weight", "output.weight"),
    file_type: int = 1,
) -> Path:
    """Write a GGUF file with a complete header and tensors of a few KB whose data depends on ``seed``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs: dict[str, Any] = {
        "general.architecture": architecture,
        "general.file_type": file_type,
        f"{architecture}.block_count": 1,
        f"{architecture}.context_length": 4096,
        f"{architecture}.embedding_length": 32,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}",
    }
    pairs.update(metadata or {})
    pairs = {key: value for key, value in pairs.items() if value is not None}
    data = hashlib.sha256(str(seed).encode()).digest() * 64
    new_tensors = [NewTensor(name, (32, 32), 1, lambda: [data]) for name in tensors]
    writer.write(path, pairs, new_tensors)
    return path


class OllamaStore:
    """A store under ``root`` in the layout of ``ollama pull``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "manifests").mkdir(exist_ok=True)

    def blob(self, content: bytes, *, old: bool = False) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256{':' if old else '-'}{digest}").write_bytes(content)
        return {"digest": f"sha256:{digest}", "size": len(content)}

    def path(self, layer: Mapping[str, Any]) -> Path:
        return self.root / "blobs" / str(layer["digest"]).replace(":", "-")

    def layer(self, kind: str, content: bytes, *, old: bool = False) -> dict[str, Any]:
        return {"mediaType": KIND + kind, **self.blob(content, old=old)}

    def manifest(
        self,
        name: str,
        layers: Sequence[Mapping[str, Any]],
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a manifest. Returns its path.

        Args:
            name: ``model:tag``, optionally preceded by namespace or host and namespace.
            layers: the layers' descriptors, from `layer`.
            config: changes to the default configuration.
        """
        path, tag = name.rsplit(":", 1)
        parts = path.split("/")
        parts = ["registry.ollama.ai", "library"][: 3 - len(parts)] + parts
        file = self.root.joinpath("manifests", *parts, tag)
        file.parent.mkdir(parents=True, exist_ok=True)
        config = {"model_format": "gguf", "model_family": "llama", "file_type": "F16"} | dict(config or {})
        settings = self.blob(json.dumps(config).encode())
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json", **settings},
            "layers": list(layers),
        }
        file.write_text(json.dumps(manifest))
        return file

    def model(self, name: str, tmp: Path, *, seed: int = 0, extra: Sequence[Any] = (), **gguf: Any) -> Path:
        """Write a model with one blob. Returns the manifest's path."""
        content = write_gguf(tmp / "x.gguf", seed=seed, **gguf).read_bytes()
        return self.manifest(name, [self.layer("model", content), *extra])


def hub_repository(cache: Path, name: str, commit: str = "c0ffee") -> Path:
    """Create an empty repository in a Hugging Face cache. Returns the snapshot's folder."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def hub_file(snapshot: Path, relative: str, content: bytes) -> Path:
    """Write a file of a snapshot: a symbolic link to its blob."""
    blob = snapshot.parents[1] / "blobs" / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    path = snapshot / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(blob)
    return path


def shut(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make ``os`` functions refuse access to a folder's content, also for root."""

    def patch(name: str) -> None:
        real = getattr(os, name)

        def guarded(path: Any = ".", *args: Any, **more: Any) -> Any:
            if isinstance(path, (str, os.PathLike)):
                inside = folder in Path(path).parents
                if inside or (name in ("scandir", "listdir", "access") and Path(path) == folder):
                    if name == "access":
                        return False
                    raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(path, *args, **more)

        monkeypatch.setattr(os, name, guarded)

    for name in ("stat", "lstat", "open", "scandir", "listdir", "access"):
        patch(name)

"""Scans Ollama's store: ``manifests/{host}/{namespace}/{model}/{tag}`` and ``blobs/sha256-<hex>``.

It is never written: Ollama deletes unknown files in ``blobs``, and the models are the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pwd
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from sollold.errors import system_reason
from sollold.models.names import Name, is_name
from sollold.models.stores.ollama_unit import UNITS, ollama_service
from sollold.models.stores.permission_hint import permission_hint, whoami
from sollold.models.stores.safe_read import MOST, UNDECODABLE, open_file, read_text
from sollold.models.stores.scan_result import FoundModel, Problem, Scan, stamp, unreadable
from sollold.settings.location import expanded, home_folder

_KIND = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_HOMES = ("/usr/share/ollama", "/var/lib/ollama")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_MODELS = 20_000
_MAX_LICENSES = 16
_MAX_TEXT_BYTES = 16 << 20
"""Maximum size of a text blob; the text of larger ones is left out."""
_Size = Annotated[int, Meta(le=1 << 50)]
"""Bytes of a layer. The sum over a manifest must fit into 64 bits, since lists of models are sent."""


class _Layer(msgspec.Struct):
    mediaType: str = ""
    digest: str = ""
    size: _Size = 0
    from_: str | None = msgspec.field(name="from", default="")


class _Manifest(msgspec.Struct):
    config: _Layer | None = None
    layers: list[_Layer] | None = None


class _Config(msgspec.Struct):
    model_format: str | None = ""
    model_family: str | None = ""
    file_type: str | None = ""
    remote_host: str | None = ""
    capabilities: list[str] | None = None
    context_length: Annotated[int, Meta(le=1 << 60)] | None = 0
    renderer: str | None = ""


class _Message(msgspec.Struct):
    role: str
    content: str = ""


_TEXTS = ("template", "prompt", "system", "params", "messages")
"""Kinds of layers that hold text."""


def roots(
    configured: Iterable[str] = (),
    *,
    environ: Mapping[str, str] | None = None,
    home: Path | None = None,
    units: Iterable[str] = UNITS,
    homes: Iterable[str] = _HOMES,
) -> tuple[Path, ...]:
    """Return the folders where Ollama's models may be, the most likely first, without duplicates.

    Only the settings' roots if there are any. Otherwise: the systemd unit's OLLAMA_MODELS, this process's,
    the home of the unit's environment, of the service user, the usual homes, the home of this user.
    """
    if paths := [expanded(path) for path in configured]:
        return _unique(paths)
    environ = os.environ if environ is None else environ
    home = home_folder() if home is None else home
    found: list[Path] = []
    user, service = ollama_service(units)
    if path := service.get("OLLAMA_MODELS"):
        found.append(Path(path))
    if path := environ.get("OLLAMA_MODELS"):
        found.append(expanded(path))
    if service_home := service.get("HOME"):
        found.append(Path(service_home) / ".ollama/models")
    with contextlib.suppress(KeyError):
        found.append(Path(pwd.getpwnam(user or "ollama").pw_dir) / ".ollama/models")
    found.extend(Path(base) / ".ollama/models" for base in homes)
    found.append(home / ".ollama/models")
    return _unique(found)


def _unique(paths: Iterable[Path]) -> tuple[Path, ...]:
    # Compared by path only: resolving links could block on a share that does not respond.
    return tuple(dict.fromkeys(path.absolute() for path in paths))


def scan(root: Path) -> Scan:
    """Scan one store for models. A missing store gives none and is watched for."""
    result = Scan()
    manifests = root / "manifests"
    result.see(manifests)
    if not _reachable(root, result) or not manifests.is_dir():
        return result
    room = _MAX_MODELS
    invalid: list[Path] = []
    for path, name in _manifests(manifests, root, result):
        room -= 1
        if room < 0:
            continue
        result.see(path)
        if is_name(str(name)):
            result.found.append(_read(root, path, name, result))
        else:
            invalid.append(path)
    if room < 0:
        problem = f"The Ollama store {root} has {_MAX_MODELS - room} models; only {_MAX_MODELS} are listed."
        result.problems.append(Problem(problem))
    if invalid:
        suffix = f" and {len(invalid) - 1} more" if len(invalid) > 1 else ""
        result.problems.append(
            Problem(
                f"{invalid[0]}{suffix} in an Ollama store is not a valid model name and is ignored; "
                "move it elsewhere, or pull the model again under a proper name."
            )
        )
    return result


def _manifests(manifests: Path, root: Path, result: Scan) -> Iterator[tuple[Path, Name]]:
    """Yield every manifest and the name given by its path: host, namespace, model, tag."""
    paths: Iterable[Path] = [manifests]
    for _ in ("host", "namespace", "model", "tag"):
        paths = _all_children(paths, root, result)
    for tag in paths:
        if tag.is_file() and not tag.name.startswith("."):
            yield tag, Name(*tag.relative_to(manifests).parts)


def _all_children(folders: Iterable[Path], root: Path, result: Scan) -> Iterator[Path]:
    for folder in folders:
        yield from _children(folder, root, result)


def _reachable(root: Path, result: Scan) -> bool:
    """Return False and add a problem if permissions forbid access."""
    try:
        next(os.scandir(root / "manifests"), None)
    except PermissionError:
        problem = f"The Ollama store {root} can't be read by {whoami()}; its models are not listed."
        result.problems.append(Problem(problem, permission_hint(root / "manifests", root)))
        return False
    except OSError:
        return False
    return True


def _children(folder: Path, root: Path, result: Scan) -> list[Path]:
    try:
        if not folder.is_dir():
            return []
        result.see(folder)
        # A folder that may be listed but not entered gives names and nothing else.
        if os.access(folder, os.X_OK):
            return sorted(folder.iterdir())
        raise PermissionError
    except PermissionError:
        problem = f"The folder {folder} of an Ollama store can't be read by {whoami()}."
        result.problems.append(Problem(problem, permission_hint(folder, root)))
    except OSError:
        pass
    return []


def _read(root: Path, file: Path, name: Name, result: Scan) -> FoundModel:
    """Read one manifest. Any fault in it ends in ``unusable``."""
    label = str(name)
    try:
        with open_file(file) as handle:
            raw = handle.read(_MAX_MANIFEST_BYTES)
            modified = os.fstat(handle.fileno()).st_mtime
    except PermissionError:
        return FoundModel(
            label, "ollama", unusable=f"Its manifest can't be read. Run: {permission_hint(file, root)}"
        )
    except OSError as error:
        return FoundModel(label, "ollama", unusable=f"Its manifest can't be read: {system_reason(error)}.")
    digest = hashlib.sha256(raw).hexdigest()
    advice = f"Pull it again: ollama pull {label}"
    try:
        manifest = msgspec.json.decode(raw, type=_Manifest)
    except UNDECODABLE as error:
        unusable = f"Its manifest is damaged ({error}). {advice}"
        return FoundModel(label, "ollama", modified=modified, manifest=digest, unusable=unusable)
    layers = manifest.layers or []
    config = _config(root, manifest.config)
    texts = {kind: _layer_text(root, layers, kind) for kind in _TEXTS}
    licenses = [_blob_text(path) for path in _blobs(root, layers, "license")[:_MAX_LICENSES]]
    kind = "gguf"
    if name.cloud or config.remote_host:
        kind = "cloud"
    elif config.model_format == "safetensors" or not _blobs(root, layers, "model"):
        kind = "safetensors"
    found = FoundModel(
        label,
        "ollama",
        files=tuple(map(str, _blobs(root, layers, "model"))) if kind == "gguf" else (),
        projector=next((str(path) for path in _blobs(root, layers, "projector")), ""),
        adapters=tuple(str(path) for path in _blobs(root, layers, "adapter")),
        modified=modified,
        size=sum(max(0, layer.size) for layer in layers),
        # With a renderer, Ollama's own code makes the prompt, as the file's own template does.
        template="" if config.renderer else texts["template"] or texts["prompt"],
        system=texts["system"],
        messages=_messages(texts["messages"]),
        params=_params(texts["params"]),
        license="\n\n".join(licenses),
        manifest=digest,
        parent=next((layer.from_ or "" for layer in layers if layer.mediaType == f"{_KIND}model"), ""),
        format=kind,
        architecture=config.model_family or "",
        quantization=config.file_type or "",
        context_train=max(0, config.context_length or 0),
        capabilities=tuple(config.capabilities or ()),
    )
    return _checked(root, found, advice, result)


def _checked(root: Path, found: FoundModel, advice: str, result: Scan) -> FoundModel:
    """Return the model, marked if something keeps it from running; its blobs are watched."""
    if found.format == "cloud":
        return unreadable(found, "It runs in Ollama's cloud; there is no file on this machine.")
    if found.format == "safetensors":
        return found
    for path in (*found.files, *filter(None, (found.projector,)), *found.adapters):
        result.see(path)
        try:
            with open_file(Path(path)) as blob:
                if not blob.read(1):
                    return unreadable(found, f"The blob {path} is empty. {advice}")
        except FileNotFoundError:
            return unreadable(found, f"The blob {path} is missing. {advice}")
        except PermissionError:
            return unreadable(
                found, f"The blob {path} can't be read. Run: {permission_hint(Path(path), root)}"
            )
        except OSError as error:
            return unreadable(found, f"The blob {path} can't be read: {system_reason(error)}.")
    return found


def _blob(root: Path, digest: str) -> Path | None:
    """Return the path of a blob under its current name or that of old stores; None for an invalid digest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        return None
    path = root / "blobs" / f"sha256-{match[1]}"
    old = root / "blobs" / f"sha256:{match[1]}"
    # In a folder that may not be entered neither is visible: opening the blob then reports that.
    return old if stamp(path) is None and stamp(old) is not None else path


def _blobs(root: Path, layers: Iterable[_Layer], kind: str) -> list[Path]:
    paths = (_blob(root, layer.digest) for layer in layers if layer.mediaType == f"{_KIND}{kind}")
    return [path for path in paths if path is not None]


def _layer_text(root: Path, layers: Iterable[_Layer], kind: str) -> str:
    paths = _blobs(root, layers, kind)
    return _blob_text(paths[-1]) if paths else ""


def _blob_text(path: Path) -> str:
    """Return the beginning of a text blob; empty if it can't be read, or its name is not that of its content.

    Whoever may write to the store could otherwise publish any file that the daemon can read, by a link to it.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            digest.update(text := file.read(MOST))
            for _ in range(_MAX_TEXT_BYTES // MOST):
                if not (piece := file.read(MOST)):
                    break
                digest.update(piece)
    except OSError:
        return ""
    return text.decode("utf-8", "replace") if path.name.endswith(digest.hexdigest()) else ""


def _config(root: Path, layer: _Layer | None) -> _Config:
    path = _blob(root, layer.digest) if layer else None
    try:
        return msgspec.json.decode(read_text(path), type=_Config) if path else _Config()
    except UNDECODABLE:
        return _Config()


def _messages(text: str) -> tuple[tuple[str, str], ...]:
    """Parse Ollama's MESSAGEs; anything else gives none."""
    try:
        found = msgspec.json.decode(text, type=list[_Message]) if text else []
    except UNDECODABLE:
        return ()
    return tuple((message.role, message.content) for message in found)


def _params(text: str) -> str:
    """Return Ollama's default options as JSON; ``{}`` for anything else."""
    try:
        value = json.loads(text) if text else {}
        return json.dumps(value, allow_nan=False) if isinstance(value, dict) else "{}"
    except (ValueError, RecursionError):
        return "{}"

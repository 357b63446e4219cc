"""Scans Ollama's store: ``manifests/{host}/{namespace}/{model}/{tag}`` and ``blobs/sha256-<hex>``.

It is never written: Ollama deletes unknown files in ``blobs``, and the models are the user's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sollold.errors import system_reason
from sollold.models.names import Name, is_name
from sollold.models.stores.ollama_manifest import DIGEST, MAX_BYTES, Manifest, described, parse_manifest
from sollold.models.stores.ollama_unit import UNITS, ollama_service
from sollold.models.stores.permission_hint import permission_hint, whoami
from sollold.models.stores.safe_read import MOST, open_file
from sollold.models.stores.scan_result import FoundModel, Problem, Scan, stamp, unreadable
from sollold.settings.location import expanded, home_folder
from sollold.undecodable import UNDECODABLE

_HOMES = ("/usr/share/ollama", "/var/lib/ollama")
_MAX_MODELS = 20_000
_MAX_TEXT_BYTES = 16 << 20
"""Maximum size of a text blob; the text of larger ones is left out."""


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
            raw = handle.read(MAX_BYTES)
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
        manifest = parse_manifest(raw)
    except UNDECODABLE as error:
        unusable = f"Its manifest is damaged ({error}). {advice}"
        return FoundModel(label, "ollama", modified=modified, manifest=digest, unusable=unusable)
    found = replace(
        described(name, raw, manifest, lambda digest: _blob_text(_blob(root, digest))), modified=modified
    )
    if found.format == "gguf":
        found = replace(found, files=_paths(root, manifest, "model"))
    projectors = _paths(root, manifest, "projector")[:1]
    found = replace(found, projector="".join(projectors), adapters=_paths(root, manifest, "adapter"))
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
    match = DIGEST.fullmatch(digest)
    if match is None:
        return None
    path = root / "blobs" / f"sha256-{match[1]}"
    old = root / "blobs" / f"sha256:{match[1]}"
    # In a folder that may not be entered neither is visible: opening the blob then reports that.
    return old if stamp(path) is None and stamp(old) is not None else path


def _paths(root: Path, manifest: Manifest, kind: str) -> tuple[str, ...]:
    """Return the paths of the blobs of a kind of layer."""
    paths = (_blob(root, layer.digest) for layer in manifest.of_kind(kind))
    return tuple(str(path) for path in paths if path is not None)


def _blob_text(path: Path | None) -> str:
    """Return the beginning of a text blob; empty if it can't be read, or its name is not that of its content.

    Whoever may write to the store could otherwise publish any file that the daemon can read, by a link to it.
    """
    if path is None:
        return ""
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

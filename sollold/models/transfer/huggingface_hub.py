"""Models on Hugging Face's hub, ``hf.co/org/repo:quantization``, fetched by range requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from pathlib import PurePosixPath
from urllib.parse import quote

import aiohttp
import msgspec

from sollold.models.names import TAG, Name, quantization_in
from sollold.models.stores.shards import is_projector
from sollold.models.transfer.bounded_answer import read_at_most
from sollold.models.transfer.download import SourceError
from sollold.models.transfer.internet import Internet, Unreachable
from sollold.models.transfer.partial_file import Item
from sollold.settings.confidential import hidden_in_text
from sollold.undecodable import UNDECODABLE

_PREFERRED = ("Q4_K_M", "Q4_0", "Q5_K_M", "Q8_0")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
_MAX_BYTES = 16 << 20
_FINAL = (401, 403, 404, 410)
"""Statuses of a file that is gone or may not be read, which repeating a request does not change."""


class _Lfs(msgspec.Struct):
    sha256: str = ""
    size: int = 0


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    lfs: _Lfs | None = None


class _Repository(msgspec.Struct):
    siblings: list[_Sibling]


class HubError(Exception):
    """The hub can't be reached or has no such model; ``missing`` says which."""

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


class Hub:
    """The hub, at ``$HF_ENDPOINT`` or its own address; ``$HF_TOKEN`` gives access to gated models."""

    def __init__(self, internet: Internet) -> None:
        self._internet = internet
        environ = internet.environ
        self._base = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._shown = hidden_in_text(self._base)
        """The address in messages, without the login that it may contain."""
        token = environ.get("HF_TOKEN", "")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def items(self, name: Name) -> tuple[tuple[str, ...], tuple[Item, ...]]:
        """Return the repository paths of the files that a name refers to, and the files themselves.

        Raises:
            HubError: the hub can't be reached, or has no such files.
        """
        url = f"{self._base}/api/models/{quote(name.namespace)}/{quote(name.model)}?blobs=true"
        try:
            timeout = aiohttp.ClientTimeout(total=30)
            async with self._internet.get(url, timeout, self._headers) as answer:
                if answer.status in (401, 403, 404):
                    raise HubError(
                        f"{name.namespace}/{name.model} is not on {self._shown}, or needs HF_TOKEN",
                        missing=True,
                    )
                if answer.status != 200:
                    raise HubError(f"{hidden_in_text(url)} answered {answer.status}")
                raw = await read_at_most(answer, _MAX_BYTES)
            # A repository may list hundreds of thousands of files, which take seconds.
            return await asyncio.to_thread(self._items_in, raw, name)
        except Unreachable as error:
            raise HubError(str(error)) from None
        except UNDECODABLE as error:
            raise HubError(f"{hidden_in_text(url)} was not understood: {error}") from None

    def _items_in(self, raw: bytes, name: Name) -> tuple[tuple[str, ...], tuple[Item, ...]]:
        """Do the same with the repository's description.

        Raises:
            HubError: it has no such files.
            One of `UNDECODABLE`: the description is malformed.
        """
        siblings = msgspec.json.decode(raw, type=_Repository).siblings
        chosen = choose([sibling.rfilename for sibling in siblings], name.tag)
        if not chosen:
            tags = sorted({_tag(s.rfilename) for s in siblings if s.rfilename.endswith(".gguf")} - {""})
            available = ", ".join(tags) or "none"
            raise HubError(
                f"{name.namespace}/{name.model} has no GGUF file for {name.tag!r}; it has {available}",
                missing=True,
            )
        by_path = {sibling.rfilename: sibling for sibling in siblings}
        items = []
        for path in chosen:
            sibling = by_path[path]
            size = sibling.lfs.size if sibling.lfs and sibling.lfs.size else sibling.size or 0
            if size <= 0:
                raise HubError(f"{self._shown} does not say how large {path} is")
            items.append(Item(PurePosixPath(path).name, size, sibling.lfs.sha256 if sibling.lfs else ""))
        return chosen, tuple(items)

    def source(self, name: Name, paths: tuple[str, ...]) -> HubSource:
        """Return files of a repository as a source of bytes."""
        base = f"{self._base}/{quote(name.namespace)}/{quote(name.model)}"
        urls = [f"{base}/resolve/main/{quote(path)}" for path in paths]
        return HubSource(self._internet, base, urls, self._headers)


class HubSource:
    """A `Source` of a model's files, each at a URL of the hub."""

    patience = 600.0
    """An internet connection may be down for minutes, and the hub limits requests per five minutes."""

    def __init__(self, internet: Internet, name: str, urls: list[str], headers: dict[str, str]) -> None:
        self.name = hidden_in_text(name)
        self._internet = internet
        self._urls = urls
        self._headers = headers

    async def read(self, index: int, start: int, end: int) -> AsyncGenerator[bytes]:
        """Yield bytes of one file, in order.

        Raises:
            SourceError: the hub refused or broke off.
        """
        headers = self._headers | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=60)
        try:
            async with self._internet.get(self._urls[index], timeout, headers) as answer:
                whole = answer.status == 200 and start == 0
                if answer.status != 206 and not whole:
                    url = hidden_in_text(self._urls[index])
                    raise SourceError(f"{url} answered {answer.status}", final=answer.status in _FINAL)
                async for piece in answer.content.iter_any():
                    yield piece
        except Unreachable as error:
            raise SourceError(str(error)) from None


def choose(paths: list[str], tag: str) -> tuple[str, ...]:
    """Return the files that a tag refers to, shards in order, then a projector; empty when there are none."""
    models = sorted(
        p for p in paths if p.lower().endswith(".gguf") and not is_projector(PurePosixPath(p).name)
    )
    wanted = [path for path in models if _tag(path).lower() == tag.lower()]
    if not wanted and tag == TAG:
        tags = [_tag(path) for path in models]
        best = next((preferred for preferred in _PREFERRED if preferred in tags), tags[0] if tags else "")
        wanted = [path for path in models if _tag(path) == best]
    if not wanted:
        wanted = [
            path for path in models if PurePosixPath(path).name.lower().removesuffix(".gguf") == tag.lower()
        ]
    if not wanted:
        return ()
    first = wanted[0]
    if match := _SHARD.fullmatch(first):
        shards = [path for path in wanted if (shard := _SHARD.fullmatch(path)) and shard[1] == match[1]]
        if len(shards) != int(match[2]):
            return ()
        chosen = shards
    else:
        chosen = [first]
    projectors = [p for p in paths if p.lower().endswith(".gguf") and is_projector(PurePosixPath(p).name)]
    projectors.sort(
        key=lambda p: (next((k for k, t in enumerate(("f16", "bf16")) if f"-{t}" in p.lower()), 9), p)
    )
    return (*chosen, *projectors[:1])


def _tag(path: str) -> str:
    """Return the quantization in the file's name, or in its folder's."""
    pure = PurePosixPath(path)
    match = _SHARD.fullmatch(pure.name)
    stem = match[1] if match else pure.name[: -len(".gguf")]
    return quantization_in(stem) or quantization_in(pure.parent.name)

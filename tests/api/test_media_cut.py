"""Large images and audio are cut out of a body before decoding, and put back for the engine."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import msgspec
import psutil
import pytest
from aiohttp import ClientSession

from sollold.api.http.media_cut import cut_media, restore_texts
from sollold.cluster.net.pieces import InPieces
from sollold.errors import Refusal
from sollold.serving.media import Media
from tests.api.api_parts import ScriptedService, call_of, chunk, model, parts
from tests.api.conftest import Serve
from tests.api.watched_loop import watched

MIB = 1 << 20
PICTURE = base64.b64encode(b"\x89PNG" + os.urandom(700_001)).decode()


def message(picture: str) -> dict[str, Any]:
    return {"messages": [{"content": [{"image_url": {"url": f"data:image/png;base64,{picture}"}}]}]}


async def cut(body: object, *, slashes: bool = False) -> tuple[Any, Media | None, bytes]:
    """(Decoded body, media cut out, body for the engine)."""
    raw = bytearray(json.dumps(body).replace("/", "\\/" if slashes else "/").encode())
    text, media = await cut_media(raw)
    value = msgspec.json.decode(text)
    if media is None:
        return value, None, msgspec.json.encode(value)
    value = await restore_texts(value, media)
    return value, media, await media.put_back(msgspec.json.encode(value))


@pytest.mark.parametrize("slashes", [False, True])
@pytest.mark.parametrize("before", range(5))
async def test_images_are_restored_unchanged(before: int, slashes: bool) -> None:
    body = {"x": "y" * before, **message(PICTURE), "images": [PICTURE, PICTURE[:400_000], "iVBOR"]}
    value, media, sent = await cut(body, slashes=slashes)
    assert media is not None and len(json.dumps(value)) < 100_000
    assert json.loads(sent) == body
    for image in (value["images"][0], value["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]):
        assert base64.b64decode(image, validate=True).startswith(b"\x89PNG")


async def test_equal_images_have_equal_marks() -> None:
    first, *_ = await cut(message(PICTURE))
    assert first == (await cut(message(PICTURE)))[0]
    assert first != (await cut(message(PICTURE[:300_000] + "AAAA" + PICTURE[300_004:])))[0]


@pytest.mark.parametrize(
    "text",
    ["a" * MIB, "\\" * MIB, "\u4f60\u597d" * 100_000, '{"url": "' + "A" * MIB + '"}', "n\n" * 400_000],
)
async def test_long_texts_are_unchanged(text: str) -> None:
    body = {"messages": [{"role": "user", "content": text}, {"content": [{"type": "text", "text": text}]}]}
    value, _, sent = await cut(body)
    assert value == body and json.loads(sent) == body


async def test_texts_are_bounded() -> None:
    for text in ("a" * 9 * MIB, "a " * 5 * MIB):
        with pytest.raises(Refusal, match="the text in the body") as refused:
            await cut({"prompt": text})
        assert refused.value.status == 413


async def test_a_forged_mark_is_not_replaced() -> None:
    value, media, _ = await cut(message(PICTURE))
    assert media is not None
    mark = media.marks_in(value["messages"][0]["content"][0]["image_url"]["url"])[0]
    forged = mark[:20] + "A" * (len(mark) - 20)
    text = msgspec.json.encode({"a": forged, "b": "x" * 5000 + forged})
    assert await media.put_back(text) == text


SIZE = 24 * MIB
IMAGE = b"iVBORw0KGgoA" + b"/9j/" * (SIZE // 4)
BODIES: dict[str, tuple[str, dict[str, Any], bytes, int]] = {
    "an image of Ollama's": ("/api/chat", {"messages": [{"role": "user", "content": "?", "images": ["@"]}]},
                             IMAGE, 200),
    "an image of Anthropic's": ("/v1/messages", {"max_tokens": 4, "messages": [{"role": "user", "content": [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "@"}}]}]},
                                IMAGE, 200),
    "a text": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "@"}]}, IMAGE, 413),
    "words": ("/api/generate", {"prompt": "@"}, b"words " * (SIZE // 6), 413),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
async def test_a_large_body_does_not_block_the_loop(serve: Serve, http: ClientSession, name: str) -> None:
    path, fields, long, status = BODIES[name]
    service = ScriptedService(chunk("x"), chunk(finish="stop"))
    url = await serve(parts(service, model(capabilities=("completion", "vision"))))
    raw = json.dumps({"model": "demo", "stream": True, **fields}).encode().replace(b"@", long)
    sent = b""
    before = psutil.Process().memory_info().rss
    async with watched() as loop:
        async with http.post(url + path, data=InPieces(raw)) as answer:
            assert answer.status == status, await answer.text()
            await answer.read()
        if status == 200:
            media = service.asks[-1].media
            assert media is not None
            sent = await media.put_back(msgspec.json.encode(call_of(service).body))
    assert loop.longest < 0.05
    assert loop.most_memory - before < 4 * SIZE
    assert status != 200 or IMAGE in sent

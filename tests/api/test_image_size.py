"""Images whose headers declare more pixels than engines have memory for."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from aiohttp import ClientSession

from sollold.api.engine.image_size import HEADS, MOST_PIXELS, pixels
from tests.api.api_parts import ScriptedService, chunk, model, parts
from tests.api.conftest import Serve
from tests.api.picture import png

WIDTH, HEIGHT = 60_000, 50_000


def jpeg(width: int, height: int, before: int = 0) -> bytes:
    segments = b""
    while before > 0:
        size = min(before, 60_000)
        segments += b"\xff\xe1" + struct.pack(">H", size + 2) + bytes(size)
        before -= size
    frame = struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(9)
    return b"\xff\xd8\xff\xe0" + struct.pack(">H", 16) + bytes(14) + segments + b"\xff\xff\xc2" + frame


def webp(kind: bytes, rest: bytes) -> bytes:
    return b"RIFF\0\0\0\0WEBP" + kind + bytes(4) + rest


FORMS = {
    "png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", WIDTH, HEIGHT) + bytes(5),
    "apple's png": b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI" + bytes(12) + b"IHDR" + struct.pack(">II", WIDTH, HEIGHT),
    "jpeg": jpeg(WIDTH, HEIGHT),
    "jpeg behind a preview": jpeg(WIDTH, HEIGHT, 300_000),
    "gif": b"GIF89a" + struct.pack("<HH", WIDTH, HEIGHT) + bytes(3),
    "bmp": b"BM" + bytes(12) + struct.pack("<Iii", 40, WIDTH, -HEIGHT) + bytes(30),
    "psd": b"8BPS" + bytes(10) + struct.pack(">II", HEIGHT, WIDTH) + bytes(9),
    "pnm": b"P6 # a comment\n%d %d\n255\n" % (WIDTH, HEIGHT),
    "hdr": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (HEIGHT, WIDTH),
    "tga": bytes((0, 0, 10)) + bytes(9) + struct.pack("<HH", WIDTH, HEIGHT) + bytes((24, 0)) + bytes(9),
    "webp": webp(b"VP8X", bytes(4) + (WIDTH - 1).to_bytes(3, "little") + (HEIGHT - 1).to_bytes(3, "little")),
}


@pytest.mark.parametrize("form", FORMS)
def test_sizes_are_read_from_headers(form: str) -> None:
    assert pixels(FORMS[form]) == WIDTH * HEIGHT


def test_small_unknown_and_incomplete_images() -> None:
    assert pixels(png(56, 40)) == 56 * 40
    assert pixels(webp(b"VP8L", b"\x2f" + (99 | 49 << 14).to_bytes(4, "little"))) == 100 * 50
    assert pixels(webp(b"VP8 ", bytes(6) + struct.pack("<HH", 100, 50))) == 100 * 50
    for text in (b"", b"\0\0\0", b"BM", b"\xff\xd8", b"\x89PNG", b"RIFF....WEBP", b"hello", b"GIF89a\1"):
        assert pixels(text) == 0
    assert pixels(jpeg(10, 10, 9000)[: HEADS[0]], whole=False) is None


async def _status(http: ClientSession, url: str, path: str, data: str) -> tuple[int, str]:
    message: dict[str, Any] = {"role": "user", "content": "x", "images": [data]}
    body: dict[str, Any] = {"model": "demo", "messages": [message], "max_tokens": 9, "prompt": "x"}
    if path == "/api/generate":
        body["images"] = [data]
    elif path == "/v1/messages":
        source = {"type": "base64", "media_type": "image/png", "data": data}
        message.update(content=[{"type": "image", "source": source}])
    elif path != "/api/chat":
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        message.update(content=[part])
    async with http.post(url + path, json=body) as answer:
        return answer.status, await answer.text()


async def test_a_jpeg_without_a_size_is_refused(serve: Serve, http: ClientSession) -> None:
    url = await serve(parts(ScriptedService(), model(capabilities=("completion", "vision"))))
    data = base64.b64encode(jpeg(10, 10, 2 * HEADS[-1])).decode()
    status, text = await _status(http, url, "/v1/chat/completions", data)
    assert status == 400 and "does not give its size" in text


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("form", ["png", "jpeg behind a preview"])
@pytest.mark.parametrize("filled", [0, 800_000])
async def test_an_image_with_too_many_pixels_is_refused(
    serve: Serve, http: ClientSession, path: str, form: str, filled: int
) -> None:
    """``filled`` makes the image large enough to be cut out of the body."""
    service = ScriptedService(chunk(finish="stop"))
    url = await serve(parts(service, model(capabilities=("completion", "vision"))))
    data = base64.b64encode(FORMS[form] + bytes(filled)).decode()
    status, text = await _status(http, url, path, data)
    assert status == 400 and f"{WIDTH * HEIGHT} pixels" in text and str(MOST_PIXELS) in text
    small = base64.b64encode(png() + bytes(filled)).decode()
    assert (await _status(http, url, path, small))[0] == 200
    assert len(service.asks) == 1

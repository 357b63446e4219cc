"""Images through the official clients to a real llama-server with a projector, streamed and not.

The model's answer is fixed; the number of prompt tokens shows whether it got the image.
"""

from __future__ import annotations

import base64
import os
import zlib
from typing import Any

import anthropic
import ollama
import openai
import pytest

from tests.api.callers import chatgpt, claude
from tests.api.picture import PICTURE
from tests.api.reciters import PATCHES, SEEN

pytestmark = [pytest.mark.llama, pytest.mark.clients, pytest.mark.timeout(90)]

PROMPT = "What is this?"
DATA_URL = f"data:image/png;base64,{PICTURE}"


async def test_ollama_chat_with_an_image(url: str, way: str) -> None:
    client = ollama.AsyncClient(host=url)
    assert "vision" in ((await client.show("see")).capabilities or ())
    without_image = await client.chat("see", [{"role": "user", "content": PROMPT}])
    with_image: Any = [{"role": "user", "content": PROMPT, "images": [PICTURE]}]
    whole = await client.chat("see", with_image)
    assert whole.message.content == SEEN
    assert (whole.prompt_eval_count or 0) - (without_image.prompt_eval_count or 0) == PATCHES
    parts = [part async for part in await client.chat("see", with_image, stream=True)]
    assert "".join(part.message.content or "" for part in parts) == SEEN
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count
    with pytest.raises(ollama.ResponseError, match=r"support images|multimodal requests") as refused:
        await client.chat("demo", with_image)
    # Ollama checks capabilities itself and also answers 400.
    assert refused.value.status_code == 400


async def test_ollama_generate_with_an_image(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    without_image = await client.generate("see", PROMPT)
    whole = await client.generate("see", PROMPT, images=[base64.b64decode(PICTURE)])
    assert whole.response == SEEN
    assert (whole.prompt_eval_count or 0) - (without_image.prompt_eval_count or 0) == PATCHES
    parts = [part async for part in await client.generate("see", PROMPT, images=[PICTURE], stream=True)]
    assert "".join(part.response or "" for part in parts) == SEEN
    assert parts[-1].prompt_eval_count == whole.prompt_eval_count


async def test_openai_chat_with_an_image(url: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": DATA_URL}}
    with_image: Any = [{"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]}]
    async with chatgpt(url) as client:
        without_image = await client.chat.completions.create(
            model="see", messages=[{"role": "user", "content": PROMPT}]
        )
        whole = await client.chat.completions.create(model="see", messages=with_image)
        assert whole.choices[0].message.content == SEEN
        assert whole.usage and without_image.usage
        assert whole.usage.prompt_tokens - without_image.usage.prompt_tokens == PATCHES
        text, tokens = "", 0
        async for part in await client.chat.completions.create(
            model="see", messages=with_image, stream=True, stream_options={"include_usage": True}
        ):
            text += (part.choices[0].delta.content or "") if part.choices else ""
            tokens = part.usage.prompt_tokens if part.usage else tokens
        assert text == SEEN and tokens == whole.usage.prompt_tokens
        with pytest.raises(openai.BadRequestError, match="does not support images"):
            await client.chat.completions.create(model="demo", messages=with_image)


async def test_openai_responses_with_an_image(url: str) -> None:
    picture = {"type": "input_image", "image_url": DATA_URL, "detail": "auto"}
    with_image: Any = [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}, picture]}]
    async with chatgpt(url) as client:
        without_image = await client.responses.create(model="see", input=PROMPT)
        whole = await client.responses.create(model="see", input=with_image)
        assert whole.output_text == SEEN and whole.usage and without_image.usage
        assert whole.usage.input_tokens - without_image.usage.input_tokens == PATCHES
        async with client.responses.stream(model="see", input=with_image) as stream:
            final = await stream.get_final_response()
        assert final.output_text == SEEN
        assert final.usage and final.usage.input_tokens == whole.usage.input_tokens


async def test_anthropic_with_an_image(url: str) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}
    with_image: Any = [{"role": "user", "content": [{"type": "text", "text": PROMPT}, picture]}]
    plain: Any = [{"role": "user", "content": PROMPT}]

    def prompt(usage: anthropic.types.Usage) -> int:
        return usage.input_tokens + (usage.cache_read_input_tokens or 0)

    async with claude(url) as client:
        without_image = await client.messages.create(model="see", max_tokens=99, messages=plain)
        whole = await client.messages.create(model="see", max_tokens=99, messages=with_image)
        assert whole.content[0].type == "text" and whole.content[0].text == SEEN
        assert prompt(whole.usage) - prompt(without_image.usage) == PATCHES
        async with client.messages.stream(model="see", max_tokens=99, messages=with_image) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        assert text == SEEN and prompt(final.usage) == prompt(whole.usage)
        with pytest.raises(anthropic.BadRequestError, match="does not support images"):
            await client.messages.create(model="demo", max_tokens=9, messages=with_image)


async def test_an_invalid_image_is_refused_and_the_next_is_accepted(url: str) -> None:
    client = ollama.AsyncClient(host=url)
    noise = base64.b64encode(b"x" * 99).decode()
    broken: Any = [{"role": "user", "content": PROMPT, "images": [noise]}]
    with pytest.raises(ollama.ResponseError) as refused:
        await client.chat("see", broken)
    assert refused.value.status_code == 400
    with_image: Any = [{"role": "user", "content": PROMPT, "images": [PICTURE]}]
    assert (await client.chat("see", with_image)).message.content == SEEN


def _padded(picture: bytes, size: int) -> str:
    """The PNG with a private chunk of ``size`` bytes, as base64."""
    chunk = b"prVt" + os.urandom(size)
    private = size.to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    # After the signature and the header.
    return base64.b64encode(picture[:33] + private + picture[33:]).decode()


async def test_large_images_reach_the_engine_whole(url: str) -> None:
    large = [_padded(base64.b64decode(PICTURE), size) for size in (300_000, 600_001)]
    with_image: Any = [{"role": "user", "content": PROMPT, "images": large[:1]}]
    client = ollama.AsyncClient(host=url)
    assert (await client.chat("see", with_image)).message.content == SEEN
    assert (await client.generate("see", PROMPT, images=large[1:])).response == SEEN
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}} for data in large]
    two_images: Any = [{"role": "user", "content": [{"type": "text", "text": PROMPT}, *parts]}]
    async with chatgpt(url) as gpt:
        answer = await gpt.chat.completions.create(model="see", messages=two_images)
        assert answer.choices[0].message.content == SEEN

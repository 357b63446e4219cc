"""llama-servers whose models recite a fixed output: a text, a tool call, thinking, a description of an image.

Their weights make each token lead to the next, so answers are known and deterministic. Other models have
random weights, among them one that embeds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sollold.models.gguf import demo_model
from sollold.models.gguf.demo_model import Recital
from sollold.models.model import Model
from tests.api.api_parts import model
from tests.api.direct_service import LlamaServer
from tests.gguf import projector
from tests.gguf.writer import write as write_random

TEMPLATE = Path(__file__).with_name("qwen_like.jinja")
STRICT = Path(__file__).with_name("strict.jinja")
"""Requires alternating user and assistant messages, as Mistral's and Gemma's templates do."""
SEEN = "A purple square, I think."
PATCHES = 16
"""Tokens per image."""
BROKEN_CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": \n</tool_call>'
CALL = '<tool_call>\n{"name": "get_time", "arguments": {"zone": "utc"}}\n</tool_call>'
THOUGHT, CONCLUSION = "First I ponder this.", "Forty two, surely."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time of day",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string"}},
            "required": ["zone"],
        },
    },
}

MODELS: tuple[Model, ...] = (
    model("demo:latest"),
    model("call:latest", capabilities=("completion", "tools")),
    model("think:latest", capabilities=("completion", "thinking")),
    model("see:latest", capabilities=("completion", "vision")),
    model("embed:latest", capabilities=("embedding",)),
    model("random:latest"),
    model("fill:latest", capabilities=("completion", "insert")),
    model("strict:latest"),
    model("broken:latest", capabilities=("completion", "tools")),
)


def write_all(folder: Path, template: str = demo_model.TEMPLATE) -> None:
    """Write all models into ``folder``. ``template``: chat template of those that call tools or think."""
    thought = f"<think>\n{THOUGHT}\n</think>\n\n{CONCLUSION}"
    demo_model.write(folder / "demo.gguf")
    demo_model.write(folder / "call.gguf", Recital(demo_model.pieces(CALL), name="call", template=template))
    demo_model.write(
        folder / "think.gguf", Recital(demo_model.pieces(thought), name="think", template=template)
    )
    demo_model.write(
        folder / "strict.gguf", Recital(demo_model.pieces(demo_model.GREETING), template=STRICT.read_text())
    )
    broken = Recital(demo_model.pieces(BROKEN_CALL), name="broken", template=template)
    demo_model.write(folder / "broken.gguf", broken)
    seen = Recital(demo_model.pieces(SEEN), name="see")
    demo_model.write(folder / "see.gguf", seen)
    projector.write(folder / "mmproj-see.gguf", seen.width)
    write_random(folder / "random.gguf")
    write_random(folder / "embed.gguf")
    # It has the special tokens for fill-in-the-middle.
    fim_tokens = {
        f"tokenizer.ggml.fim_{name}_token_id": 20 + n for n, name in enumerate(("pre", "suf", "mid"))
    }
    write_random(folder / "fill.gguf", more=dict(fim_tokens))


@contextlib.contextmanager
def serve(binary: Path | str, folder: Path) -> Iterator[dict[str, str]]:
    """Start llama-servers for all models. Yields model → URL."""
    with contextlib.ExitStack() as stack:
        urls = {}

        def start(name: str, *arguments: str, context: int = 1024) -> None:
            server = stack.enter_context(
                LlamaServer(binary, folder / f"{name}.gguf", *arguments, context=context)
            )
            urls[f"{name}:latest"] = server.url

        write_all(folder)
        start("demo")
        start("call", "--chat-template-file", str(TEMPLATE), context=2048)
        start("think", "--chat-template-file", str(TEMPLATE))
        start("strict", "--chat-template-file", str(STRICT))
        start("broken", "--chat-template-file", str(TEMPLATE))
        start("see", "--mmproj", str(folder / "mmproj-see.gguf"))
        start("random", context=512)
        start("fill", context=512)
        start("embed", "--embedding", "--pooling", "mean", "-ub", "128", "-b", "128", context=128)
        yield urls

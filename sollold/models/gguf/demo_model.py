"""Writes a model that recites a text: its weights make each token lead to the next one.

It runs in llama.cpp like any other of the llama family. Attention and feed-forward add nothing, so the hidden
state is a code of the last token alone, and the output matrix maps each code to the next token. Any other
prompt leads to the beginning of the text; a part of the text is continued from where it ends. The text is the
same at every temperature, and generated text is tokenized into the same tokens again, so an interrupted
answer can be continued exactly.
"""

from __future__ import annotations

import itertools
import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sollold.facts import dataclass
from sollold.models.gguf import writer
from sollold.models.gguf.writer import MetadataValue, NewTensor

GREETING = (
    "Hello! This is sollold's demo model. It knows only these few sentences, but they came to you the way "
    "every answer does: through whichever node was asked, from layers spread over one machine or several. "
    "Put a real GGUF file where your models are, and ask again."
)

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
_F32, _F16, _Q8_0 = 0, 1, 8
_HEAD = 64
_NORMAL, _CONTROL = 1, 3


@dataclass(frozen=True, slots=True)
class Recital:
    """The text to recite, and the size of the model.

    Attributes:
        pieces: the tokens of the text, in order. Each occurs once, has more than one byte, and is no prefix
            of another, so that the text can be tokenized in one way only.
        name: ``general.name`` of the file.
        layers: number of blocks, at least 1.
        width: elements of the hidden state, a multiple of 64; 256 distinguish some thousand tokens.
        hidden: elements of the feed-forward layer, a multiple of 32; it determines the size of a block.
        heavy: write the blocks' zeros to disk instead of leaving holes.
        context: value of the training context in the header, in tokens.
        template: the chat template in the file.
        predicts: add an MTP layer, which always predicts correctly; the architecture is then glm4moe, for
            which llama.cpp drafts by such layers.
    """

    pieces: tuple[str, ...]
    name: str = "sollold demo"
    layers: int = 2
    width: int = 256
    hidden: int = 512
    heavy: bool = False
    context: int = 32_768
    template: str = TEMPLATE
    predicts: bool = False

    def __post_init__(self) -> None:
        if self.layers < 1 or self.width % _HEAD or self.hidden % 32 or not self.pieces:
            raise ValueError("a recital needs pieces, a layer, a width of n × 64 and a hidden size of n × 32")
        if min(len(piece.encode()) for piece in self.pieces) < 2:
            raise ValueError("a piece of the text needs more than one byte")
        ordered = sorted((*self.pieces, *_SPECIAL))
        for shorter, longer in itertools.pairwise(ordered):
            if longer.startswith(shorter):
                raise ValueError(f"pieces {shorter!r} and {longer!r}: one is a prefix of the other")

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


def pieces(text: str) -> tuple[str, ...]:
    """Cut a text into pieces for a `Recital`: words, joined where a word alone would occur twice."""
    words = re.findall(r"\s*\S+", text)
    cut: list[str] = []
    current = ""
    for word in words:
        current += word
        if len(current) > 1 and not any(
            current.startswith(piece) or piece.startswith(current) for piece in cut
        ):
            cut.append(current)
            current = ""
    if current:
        # The rest is a prefix of an earlier piece or the other way round: join all pieces from that one on.
        while cut and any(current.startswith(piece) or piece.startswith(current) for piece in cut):
            current = cut.pop() + current
        cut.append(current)
    return tuple(cut)


def counting(count: int, first: int = 1) -> tuple[str, ...]:
    """Return the pieces ``w0001 w0002 …``: a text in which a lost or duplicated token is visible."""
    digits = max(4, len(str(first + count - 1)))
    return tuple(f"w{number:0{digits}} " for number in range(first, first + count))


def write(path: str | Path, recital: Recital | None = None) -> None:
    """Write the model as a GGUF file; by default the greeting. Blocks.

    Raises:
        OSError: the file can't be written; then none is left.
    """
    recital = recital or Recital(pieces(GREETING))
    tokens, kinds = _vocabulary(recital.pieces)
    writer.write(path, _metadata(recital, tokens, kinds), list(_tensors(recital, len(tokens))))


def _vocabulary(text: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the vocabulary: bytes, specials and the text, escaped for llama.cpp's ``rwkv`` tokenizer."""
    tokens = [f"\\x{value:02x}" for value in range(256)]
    kinds = [_NORMAL] * 256 + [_CONTROL] * len(_SPECIAL) + [_NORMAL] * len(text)
    tokens += _SPECIAL
    tokens += (_escaped(piece) for piece in text)
    return tokens, kinds


def _escaped(piece: str) -> str:
    return "".join(
        chr(value) if 32 <= value < 127 and value != 92 else f"\\x{value:02x}" for value in piece.encode()
    )


def _metadata(recital: Recital, tokens: list[str], kinds: list[int]) -> dict[str, MetadataValue]:
    heads = recital.width // _HEAD
    name = "glm4moe" if recital.predicts else "llama"
    predicting: dict[str, MetadataValue] = {
        f"{name}.nextn_predict_layers": 1,
        f"{name}.leading_dense_block_count": recital.layers,
        f"{name}.expert_count": 1,
        f"{name}.expert_used_count": 1,
        f"{name}.expert_shared_count": 1,
        f"{name}.expert_feed_forward_length": recital.hidden,
    }
    return (predicting if recital.predicts else {}) | {
        "general.architecture": name,
        "general.type": "model",
        "general.name": recital.name,
        "general.file_type": 7,
        "general.license": "mit",
        f"{name}.block_count": recital.layers + recital.predicts,
        f"{name}.context_length": recital.context,
        f"{name}.embedding_length": recital.width,
        f"{name}.feed_forward_length": recital.hidden,
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": heads,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.dimension_count": _HEAD,
        f"{name}.vocab_size": len(tokens),
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": recital.template,
    }


def _tensors(recital: Recital, vocabulary: int) -> Iterator[NewTensor]:
    width, hidden = recital.width, recital.hidden
    text_start = 256 + len(_SPECIAL)
    codes = _codes(width, len(recital.pieces) + 1)
    zeros = array("f", bytes(4 * width))
    ones = array("f", [1.0]) * width

    def embedding() -> Iterator[bytes]:
        for token in range(vocabulary):
            yield codes[max(0, token - text_start + 1)].tobytes()

    def leads_to() -> Iterator[bytes]:
        for token in range(vocabulary):
            previous = len(recital.pieces) if token == 256 else token - text_start
            yield (codes[previous] if previous >= 0 else zeros).tobytes()

    def norm() -> Iterable[bytes]:
        return (ones.tobytes(),)

    def matrix(name: str, columns: int, rows: int) -> NewTensor:
        tensor = NewTensor(name, (columns, rows), _Q8_0)
        return (
            NewTensor(name, (columns, rows), _Q8_0, lambda: _zeros(tensor.size)) if recital.heavy else tensor
        )

    yield NewTensor("token_embd.weight", (width, vocabulary), _F32, embedding)
    yield NewTensor("output_norm.weight", (width,), _F32, norm)
    yield NewTensor("output.weight", (width, vocabulary), _F32, leads_to)
    before_feeding = "post_attention_norm" if recital.predicts else "ffn_norm"
    for block in range(recital.layers + recital.predicts):
        yield NewTensor(f"blk.{block}.attn_norm.weight", (width,), _F32, norm)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield matrix(f"blk.{block}.{name}.weight", width, width)
        yield NewTensor(f"blk.{block}.{before_feeding}.weight", (width,), _F32, norm)
        if block == recital.layers:
            yield from _predicting(block, width, hidden)
            break
        yield matrix(f"blk.{block}.ffn_gate.weight", width, hidden)
        yield matrix(f"blk.{block}.ffn_up.weight", width, hidden)
        yield matrix(f"blk.{block}.ffn_down.weight", hidden, width)


def _predicting(block: int, width: int, hidden: int) -> Iterator[NewTensor]:
    """Yield the remaining tensors of an MTP layer.

    From a token's code and the state before it, it takes the code, and so continues as the model does; its
    only expert adds nothing.
    """

    def joined() -> Iterator[bytes]:
        for row in range(width):
            weights = array("f", bytes(8 * width))
            weights[row] = 1.0
            yield weights.tobytes()

    def ones() -> Iterable[bytes]:
        return ((array("f", [1.0]) * width).tobytes(),)

    yield NewTensor(f"blk.{block}.nextn.eh_proj.weight", (2 * width, width), _F32, joined)
    for name in ("nextn.enorm", "nextn.hnorm"):
        yield NewTensor(f"blk.{block}.{name}.weight", (width,), _F32, ones)
    yield NewTensor(f"blk.{block}.ffn_gate_inp.weight", (width, 1), _F32)
    yield NewTensor(f"blk.{block}.exp_probs_b.bias", (1,), _F32)
    for suffix, dimensions in (("exps", (1,)), ("shexp", ())):
        for name in ("gate", "up"):
            yield NewTensor(f"blk.{block}.ffn_{name}_{suffix}.weight", (width, hidden, *dimensions), _Q8_0)
        yield NewTensor(f"blk.{block}.ffn_down_{suffix}.weight", (hidden, width, *dimensions), _Q8_0)


def _codes(width: int, count: int) -> list[array[float]]:
    """Return random vectors of ±1: the product of equal ones is ``width``, that of others is near 0."""
    source = random.Random(11435)
    codes = []
    for _ in range(count):
        bits = source.getrandbits(width)
        codes.append(array("f", [1.0 if bits >> index & 1 else -1.0 for index in range(width)]))
    return codes


def _zeros(size: int) -> Iterator[bytes]:
    piece = bytes(1 << 20)
    while size > 0:
        yield piece[: min(size, len(piece))]
        size -= len(piece)

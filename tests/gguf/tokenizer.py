"""A tokenizer and chat templates for random models. It encodes any text and decodes every token."""

from __future__ import annotations

from sollold.models.gguf.writer import MetadataValue

SPECIAL = (
    "<|end|>",
    "<|start|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|pad|>",
    "<image>",
)
SMALLEST = 256 + len(SPECIAL)

_HEAD = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
)
_ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "none": "",
    "plain": _HEAD + _ASK,
    "tools": (
        '{% if tools %}<|system|>\nYou may call these functions; write <tool_call>{"name": ..., '
        '"arguments": {...}}</tool_call> to call one:\n'
        "{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] or '' }}"
        "{% if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "</tool_call>{% endfor %}{% endif %}<|end|>\n{% endfor %}" + _ASK
    ),
    # As Gemma's and Mistral's: the roles user and assistant must alternate.
    "strict": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}<|system|>\n"
        "{{ messages[0]['content'] }}<|end|>\n{% else %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
        "{% endif %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}" + _ASK
    ),
    "thinking": (
        "{% for message in messages %}<|{{ message['role'] }}|>\n"
        "{% if message['role'] == 'assistant' and '</think>' in message['content'] %}"
        "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% else %}<think>\n{% endif %}{% endif %}"
    ),
}


def tokenizer(vocabulary: int, template: str = "plain") -> dict[str, MetadataValue]:
    """The metadata of a tokenizer (byte-level BPE with a single merge) with ``vocabulary`` tokens.

    Raises:
        ValueError: ``vocabulary`` is smaller than `SMALLEST`.
    """
    if vocabulary < SMALLEST:
        raise ValueError(f"the vocabulary needs {SMALLEST} tokens")
    tokens = [_BYTES[value] for value in range(256)]
    tokens += SPECIAL
    tokens += (f"\u0120word{number}" for number in range(vocabulary - SMALLEST))
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * len(SPECIAL) + [1] * (vocabulary - SMALLEST),
        "tokenizer.ggml.merges": [f"{_BYTES[ord('w')]} {_BYTES[ord('o')]}"],
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 262,
        "tokenizer.ggml.add_bos_token": False,
    }
    if TEMPLATES[template]:
        metadata["tokenizer.chat_template"] = TEMPLATES[template]
    return metadata


def _byte_letters() -> list[str]:
    """The character of byte-level BPE for each byte: itself if printable, otherwise from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, extra = [], 0
    for value in range(256):
        if value in printable:
            letters.append(chr(value))
        else:
            letters.append(chr(256 + extra))
            extra += 1
    return letters


_BYTES = _byte_letters()

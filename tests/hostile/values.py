"""Hostile values for fields of a request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

LONG = 60_000


def _nested(depth: int, name: str = "") -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {name: value} if name else [value]
    return value


def _repeated(text: str, length: int = LONG) -> str:
    return text * (length // len(text))


def _letters() -> str:
    return "".join(random.choices('ab \n"\\{}[]<>|/%$\u00e9\U0001f600', k=2000))


_REPEATED = (
    "a", " ", "\n", "[", "(", "{", '"', '"[', "\\", "<", "<think>", "{{", "{{ .", "{%", "(a|", "x{1,", "#",
    "ab\\",
    "data:", "%", "/", "../", "=", "\u0301", "\U0001f600", "<|end|>", "<|user|>\n", "<tool_call>", "w0001 ",
    "-", "0",
)  # fmt: skip

VALUES: tuple[Any | Callable[[], Any], ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, 2**64, -(2**64), 10**400, 0.1, -0.0,
    1e-320,
    1e308, -1e308, float("nan"), float("inf"), float("-inf"), "", " ", "\0", "\ud800", "\udc00x", "\u202e",
    "%s%n%d",
    "NaN", "-1", "1e9999", "0x10", "true", "null", "{}", "[]", "5m", "-5m", "99999999999h", "9" * 5000,
    "a/b:c@d",
    "../../../etc/passwd", "/etc/passwd", "C:\\x", "file:///etc/passwd", "http://127.0.0.1:11436/", "//x",
    "demo:",
    ":latest", "hf.co/a/b", "registry.ollama.ai/library/x", "sha256:" + "0" * 64, "sha256:..", "$(reboot)",
    "`x`",
    "data:", "data:,", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:audio/wav;base64,!!",
    "a\r\nb",
    "\x1b[2J", "(a+)+$", "^(?=a)b", "[", "(" * 300, "root ::= root", 'root ::= ("a"', "root ::= " + "(" * 199,
    "root ::= [" + "\\" * 999, 'root ::= "a"{1,9999}', "root ::= (" * 190, "root ::= a\na ::= b\nb ::= a",
    [], {}, [[]], [{}], {"": ""}, {"a": None}, [None], [[], {}, 1, "a", None], [-1], [0.5], [2**70],
    ["a"] * 300,
    {"$ref": "#"}, {"$ref": "#/a"}, {"type": "object", "additionalProperties": False}, {"type": ["x", None]},
    {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "minLength": 10**9}, {"enum": [1, "a", None]},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 10**6}, {"anyOf": [{"$ref": "#"}] * 50},
    {"not": {}},
    {"type": "json_schema", "json_schema": {"schema": {"allOf": [{}, {"type": "x"}]}}}, {"type": "text"},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:11435/api/tags"}}, {"type": "input_audio"},
    [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}],
    [{"type": "file", "file": {"file_data": "x"}}], [{"role": "tool", "content": None}], [{"role": "alien"}],
    [{"role": "user", "content": "x" * 40_000}], [{"role": "user", "content": "a"}] * 400,
    [{"type": "function", "function": {"name": "\n", "parameters": {"type": "string"}}}],
    [{"type": "custom"}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], [[["a", -100]]],
    {str(number): -100 for number in range(2000)}, {"lora": [{"id": 0, "scale": 1e30}]}, {"name": "get_time"},
    lambda: _nested(150), lambda: _nested(700, "a"), lambda: _nested(120, "properties"),
    lambda: _nested(60, "items"),
    lambda: [0] * 100_000, lambda: [{}] * 20_000, lambda: ["x"] * 30_000,
    lambda: {f"k{n}": n for n in range(20_000)},
    lambda: [[0.1] * 100] * 200, lambda: ["a" * 300] * 2000, lambda: "a" * 2_000_000,
    lambda: "\U0001f600" * 200_000,
    lambda: {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(6000)}},
    _letters, _letters,
    lambda: _repeated(random.choice(_REPEATED)), lambda: _repeated(random.choice(_REPEATED)),
    lambda: _repeated(random.choice(_REPEATED)), lambda: _repeated(random.choice(_REPEATED), 600_000),
    lambda: "root ::= " + _repeated(random.choice(_REPEATED)),
    lambda: {"a": _repeated(random.choice(_REPEATED))},
)  # fmt: skip
"""Values, and functions that create large values."""

_EXTRA = """
    grammar json_schema response_format format tools tool_choice functions function_call stop n_predict
    num_predict max_tokens max_completion_tokens num_ctx num_batch num_gpu num_keep keep_alive logit_bias
    n_probs logprobs top_logprobs samplers seed temperature top_k top_p min_p typical_p mirostat
    dry_multiplier dry_sequence_breakers repeat_last_n lora id_slot cache_prompt stream stream_options
    think thinking reasoning reasoning_effort chat_template_kwargs add_generation_prompt
    continue_final_message system template raw context suffix images input prompt messages model name
    options user metadata store n best_of echo priority deadline parse_special return_tokens
    response_fields t_max_predict_ms sse_ping_interval ignore_eos parallel_tool_calls prediction
    service_tier previous_response_id include truncation tool_resources query documents adapters quantize
    modelfile license files from parameters dimensions truncate encoding_format
"""
EXTRA_FIELDS = tuple(_EXTRA.split())
"""Fields of some route or engine."""

"""Protects engines from requests: forbids fields, URLs, and sizes that an engine does not survive. Pure.

llama-server fetches the URLs that it is given (from this machine's network), accepts fields that change it
for other callers, and crashes on grammars that are nested too deeply.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sized
from typing import Any

from sollold.api.engine.image_size import HEADS, MOST_PIXELS, pixels
from sollold.api.grammar.grammar_width import TooManyWays, check_grammar
from sollold.api.grammar.schema_width import TooWide, check_schema
from sollold.errors import bad_image, bad_request
from sollold.serving.media import Media
from sollold.serving.request import Call, Engine

_SAMPLING = """
    temperature dynatemp_range dynatemp_exponent top_k top_p top_n_sigma min_p min_keep typical_p typ_p
    xtc_probability xtc_threshold repeat_last_n repeat_penalty presence_penalty frequency_penalty
    dry_multiplier dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers
    adaptive_target adaptive_decay mirostat mirostat_tau mirostat_eta samplers seed logit_bias ignore_eos
    n_probs post_sampling_probs logprobs top_logprobs
"""
_GENERATION = """
    model stream stream_options n max_tokens max_completion_tokens n_predict n_keep n_indent t_max_predict_ms
    stop cache_prompt return_tokens timings_per_token return_progress response_fields sse_ping_interval
    response_format grammar json_schema
"""
_CHAT = """
    messages tools tool_choice parallel_tool_calls functions function_call chat_template_kwargs
    reasoning_format reasoning_effort reasoning_in_content reasoning_budget_tokens thinking_budget_tokens
    parse_tool_calls add_generation_prompt continue_final_message
"""
_OTHER_FIELDS = """
    prompt user metadata store echo suffix best_of thinking enable_thinking thinking_forced_open
    input content encoding_format dimensions embd_normalize query documents texts top_n tokens add_special
    parse_special with_pieces input_prefix input_suffix input_extra
"""
SAMPLING = frozenset(_SAMPLING.split())
GENERATION = frozenset(_GENERATION.split())
"""Fields of any generation."""
CHAT = frozenset(_CHAT.split())
FIELDS = SAMPLING | GENERATION | CHAT | {*_OTHER_FIELDS.split()}
"""Fields that are passed to llama-server. It ignores unknown ones, but would act on some that are not listed:
adapters for all callers (``lora``), others' slots (``id_slot``), settings of speculation, templates."""

_NO_MEDIA = Media()
_MAX_GRAMMAR_CHARACTERS = 64 * 1024
_MAX_GRAMMAR_DEPTH = 200
_MAX_REPETITIONS = 10_000
_MAX_SCHEMA_NODES = 20_000
_MAX_SCHEMA_ENTRIES = 50_000
_CONTAINERS = frozenset((dict, list))
_MAX_SCHEMA_DEPTH = 100
_MAX_PROBABILITIES = 256
_STANDARD = str.maketrans("-_", "+/")
_MAX_NUMBERS = {
    # The largest limit on tokens that engines can represent; a larger one means no limit.
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "n_predict"), 2**31 - 1),
    # Tokens to look back at, for which memory is allocated at once; no context is longer.
    **dict.fromkeys(("repeat_last_n", "dry_penalty_last_n"), 1 << 22),
}
_MAX_PARTS = 65_536
"""Maximum messages and parts of messages in a conversation; checking a million takes 0.1 s."""
_MAX_IMAGES = 4_096
_MAX_LIST = 256
_MAX_ENTRIES = {"logit_bias": 1024}
_NESTED = frozenset(
    ("json_schema", "response_format", "format", "tools", "functions", "chat_template_kwargs")
)
_NUMBERS = frozenset(("n_probs", "top_logprobs", "logprobs"))
_LISTS: dict[str, tuple[type[Sized], ...]] = {
    "logit_bias": (dict, list),
    "stop": (list,),
    "samplers": (list, str),
    "dry_sequence_breakers": (list, str),
    "response_fields": (list, str),
}
_CHECKED_FIELDS = frozenset({"grammar", *_NESTED, *_NUMBERS, *_LISTS})
_REPETITION = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?\}")
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*+"?|\[(?:[^\]\\]|\\.)*+\]?|#[^\r\n]*', re.DOTALL)
"""A literal, a character range or a comment in llama.cpp's grammars. An unterminated one extends to the end
of the text, as it does there; otherwise matching would scan to the end from each beginning."""


def protected(calls: dict[Engine, Call], media: Media | None = None) -> dict[Engine, Call]:
    """Check ``calls``, and limit those to llama-server to `FIELDS`. ``media``: the media cut out of them.

    Raises:
        Refusal: BAD_REQUEST for anything that could harm an engine or make it contact other hosts.
    """
    return {
        engine: Call(call.path, _checked(engine, call.body, media), call.notes)
        for engine, call in calls.items()
    }


def _checked(engine: Engine, body: dict[str, Any], media: Media | None) -> dict[str, Any]:
    _check_media(body, media or _NO_MEDIA)
    # Most requests have none of these.
    checked = () if _CHECKED_FIELDS.isdisjoint(body) else sorted(_CHECKED_FIELDS & body.keys())
    for name in checked:
        # An Ollama makes no grammar of tools, so theirs do not add up.
        separate = name == "tools" and engine is Engine.OLLAMA and isinstance(body[name], list)
        for value in body[name] if separate else (body[name],):
            _check_field(name, value)
    body = _bounded(body)
    if isinstance(options := body.get("options"), dict):
        body = {**body, "options": _bounded(options)}
    if engine is Engine.OLLAMA:
        return body
    out = {name: value for name, value in body.items() if name in FIELDS}
    if isinstance(seed := out.get("seed"), int):
        # The seed has 32 bits there; -1 becomes all ones, which means a random seed.
        out["seed"] = seed & 0xFFFFFFFF
    return out


def _bounded(values: dict[str, Any]) -> dict[str, Any]:
    """Lower numbers that are too large for an engine to its maximum, which means the same."""
    large = {
        name: limit
        for name, limit in _MAX_NUMBERS.items()
        if name in values and _exceeds(values[name], limit)
    }
    return {**values, **large} if large else values


def _check_field(name: str, value: object) -> None:
    """Refuse a value that an engine does not survive in one of the fields in `_BOUNDED`."""
    if name == "grammar":
        _check_grammar(value)
    elif name in _NESTED:
        check_size(value, name)
        if not isinstance(value, MeasuredTools):
            check_width(value, name)
    elif name in _NUMBERS:
        if _exceeds(value, _MAX_PROBABILITIES):
            raise bad_request(f"{name} must be at most {_MAX_PROBABILITIES}")
    elif isinstance(value, _LISTS[name]) and len(value) > _MAX_ENTRIES.get(name, _MAX_LIST):
        raise bad_request(f"{name} has more than {_MAX_ENTRIES.get(name, _MAX_LIST)} entries")


def _exceeds(value: object, limit: int) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > limit


def _check_media(body: dict[str, Any], media: Media) -> None:
    """Refuse media that an engine would fetch, from a network that the caller may not reach, and images that
    would take all of its memory.
    """
    value = body.get("messages")
    messages = value if isinstance(value, list) else []
    holders = [
        holder
        for holder in messages
        if isinstance(holder, dict) and ("images" in holder or isinstance(holder.get("content"), list))
    ]
    if not holders and len(messages) <= _MAX_PARTS and "images" not in body:
        return
    count = _MediaCount()
    count.add_parts(len(messages))
    for holder in (body, *holders):
        if isinstance(images := holder.get("images"), list):
            count.add_images(len(images))
            for image in images:
                _check_image(image, media)
        if holder is not body and isinstance(content := holder.get("content"), list):
            count.add_parts(len(content))
            _check_content(content, count, media)


class _MediaCount:
    """Counts the parts and images of a conversation before each is checked."""

    def __init__(self) -> None:
        self._parts = self._images = 0

    def add_parts(self, count: int) -> None:
        """Count messages, or parts of one. Raises `Refusal` if there are too many."""
        self._parts += count
        if self._parts > _MAX_PARTS:
            raise bad_request(f"there are more than {_MAX_PARTS} messages and parts of messages")

    def add_images(self, count: int) -> None:
        """Count images. Raises `Refusal` if there are too many."""
        self._images += count
        if self._images > _MAX_IMAGES:
            raise bad_request(f"there are more than {_MAX_IMAGES} images")


def _check_content(content: list[Any], count: _MediaCount, media: Media) -> None:
    """Check the media in one message's parts."""
    for part in content:
        for url in _urls(part):
            if not url[:5].lower() == "data:":
                raise bad_request(
                    "media must be sent in the request (data:…;base64,…): URLs are not fetched, "
                    f"got {url[:80]!r}"
                )
            count.add_images(1)
            _check_image(url, media)


def _check_image(image: object, media: Media) -> None:
    if not isinstance(image, str):
        return
    start = image.find(",", 0, 200) + 1 if image[:5].lower() == "data:" else 0
    count: int | None = None
    for size in HEADS:
        beginning = media.head(image, start + size // 3 * 4)
        head = beginning[start:].translate(_STANDARD)
        try:
            raw = base64.b64decode(head[: len(head) // 4 * 4])
        except ValueError:
            return  # the engine will report what is wrong with it
        count = pixels(raw, whole=len(raw) < size // 3 * 3)
        if count is not None:
            break
    if count is None:
        raise bad_image(f"an image does not give its size in its first {HEADS[-1]} bytes")
    if count > MOST_PIXELS:
        raise bad_image(f"an image has {count} pixels; the limit is {MOST_PIXELS}")


def _urls(part: object) -> Iterable[str]:
    """Yield the URLs in a part of a message of any form."""
    if not isinstance(part, dict) or part.get("type") == "text":
        return
    for name, value in part.items():
        if isinstance(value, dict):
            yield from (url for key, url in value.items() if key.endswith("url") and isinstance(url, str))
        elif name.endswith("url") and isinstance(value, str):
            yield value


def _check_grammar(grammar: object) -> None:
    if not isinstance(grammar, str):
        return
    if len(grammar) > _MAX_GRAMMAR_CHARACTERS:
        raise bad_request(f"the grammar is longer than {_MAX_GRAMMAR_CHARACTERS} characters")
    rules = _LITERAL.sub("", grammar)
    for match in _REPETITION.finditer(rules):
        if any(len(count) > 6 or int(count) > _MAX_REPETITIONS for count in match.groups() if count):
            raise bad_request(f"the grammar repeats something more than {_MAX_REPETITIONS} times")
    depth = 0
    for letter in rules:
        depth += (letter == "(") - (letter == ")")
        if depth > _MAX_GRAMMAR_DEPTH:
            raise bad_request(f"the grammar is nested more than {_MAX_GRAMMAR_DEPTH} levels deep")
    try:
        check_grammar(grammar)
    except TooManyWays as error:
        raise bad_request(f"an engine would hang on the grammar: {error}") from None


def check_size(value: object, name: str) -> None:
    """Refuse a value that is nested too deeply or has too many parts. Not recursive, so safe for any value.

    Raises:
        Refusal: BAD_REQUEST, mentioning ``name``.
    """
    layer: list[Any] = [value]
    nodes = entries = 0
    for _ in range(_MAX_SCHEMA_DEPTH):
        layer = [
            child
            for container in layer
            if isinstance(container, dict | list)
            for child in (container.values() if isinstance(container, dict) else container)
            # Compares types: there may be hundreds of thousands, and isinstance() of a union is slow.
            if type(child) in _CONTAINERS
        ]
        nodes += len(layer)
        entries += sum(map(len, layer))
        if nodes > _MAX_SCHEMA_NODES:
            raise bad_request(f"{name} has more than {_MAX_SCHEMA_NODES} objects and arrays")
        if entries > _MAX_SCHEMA_ENTRIES:
            raise bad_request(f"{name} has more than {_MAX_SCHEMA_ENTRIES} keywords and values")
        if not layer:
            return
    raise bad_request(f"{name} is nested more than {_MAX_SCHEMA_DEPTH} levels deep")


class MeasuredTools(list[dict[str, Any]]):
    """Tools whose schemas were measured (`check_width`) together, so that it is not done again."""


def check_width(value: object, name: str) -> None:
    """Refuse schemas on which an engine would hang. ``value`` has passed `check_size`.

    Raises:
        Refusal: BAD_REQUEST, mentioning ``name``.
    """
    try:
        check_schema(value)
    except TooWide as error:
        raise bad_request(f"an engine would hang on the schema in {name}: {error}") from None

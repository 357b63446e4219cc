"""An endless stream of hostile HTTP requests to all routes, as raw bytes.

Each is a valid request with one hostile part: a value in its body, the body's text, its headers, its framing,
its path or its method. The same seed gives the same requests.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.hostile import framing
from tests.hostile.values import EXTRA_FIELDS, VALUES

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Hostile:
    """One request.

    Attributes:
        kind: the hostile part.
        data: the bytes to send.
        waits: the server may legitimately wait for more data.
        deadline: the request contains a deadline.
    """

    kind: str
    method: str
    path: str
    data: bytes
    waits: bool = False
    deadline: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.method} {self.path[:100]} {self.data[:1500]!r}"


@dataclass(slots=True)
class Requests:
    """A stream of hostile requests.

    Args:
        routes: (method, path) pairs as in ``/openapi.json``.
        model: an existing model.
        header: header lines of every request, for example a key.
    """

    routes: Sequence[tuple[str, str]]
    model: str
    seed: int
    header: str = ""
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def next(self) -> Hostile:
        """Return the next request."""
        method, path = self._random.choice(self.routes)
        body = _body(path, self.model) if method in ("POST", "DELETE", "PUT") else None
        path = self._filled(path)
        kinds = ("header", "framing", "path", "method")
        kind = self._random.choice(kinds if body is None else ("value",) * 6 + ("text",) * 3 + kinds)
        request: Hostile = getattr(self, f"_{kind}")(method, path, body)
        return request

    # --- hostile parts

    def _value(self, method: str, path: str, body: Body) -> Hostile:
        body = copy.deepcopy(body)
        for _ in range(self._random.choice((1, 1, 1, 2, 4))):
            self._corrupt(body)
        return self._sent("value", method, path, _json(body))

    def _text(self, method: str, path: str, body: Body) -> Hostile:
        text = _json(body)
        spoil = self._random.choice(framing.TEXTS)
        return self._sent(f"text {spoil.__name__}", method, path, spoil(self._random, text))

    def _header(self, method: str, path: str, body: Body | None) -> Hostile:
        lines = self._random.choice(framing.HEADERS)
        spoil, content = self._random.choice(framing.CONTENTS)
        return self._sent(
            f"header {lines[:40]!r} {spoil}",
            method,
            path,
            content(_json(body)) if body is not None else b"",
            lines + (f"Content-Encoding: {spoil}\r\n" if spoil else ""),
        )

    def _framing(self, method: str, path: str, body: Body | None) -> Hostile:
        frame = self._random.choice(framing.FRAMES)
        data = frame(self._random, method, path, _json(body or {}))
        return Hostile(f"framing {frame.__name__}", method, path, data, waits=True)

    def _path(self, method: str, path: str, body: Body | None) -> Hostile:
        spoiled = self._random.choice(framing.PATHS)(self._random, path)
        return self._sent(f"path {spoiled[:60]}", method, spoiled, _json(body) if body is not None else b"")

    def _method(self, method: str, path: str, body: Body | None) -> Hostile:
        odd = self._random.choice(framing.METHODS)
        return self._sent(f"method {odd[:40]}", odd, path, _json(body) if body is not None else b"")

    # --- parts

    def _corrupt(self, body: Body) -> None:
        """Set a hostile value, add an unknown field, or remove a field."""
        places = list(_places(body))
        choice = self._random.random()
        if choice < 0.35 or not places:
            name = self._random.choice(EXTRA_FIELDS)
            target = body.setdefault("options", {}) if self._random.random() < 0.3 else body
            if isinstance(target, dict):
                target[name] = self._hostile_value()
            return
        container, key = self._random.choice(places)
        if choice < 0.42:
            del container[key]
        elif choice < 0.5 and isinstance(container, list):
            container.extend([container[key]] * self._random.choice((3, 300)))
        else:
            container[key] = self._hostile_value()

    def _hostile_value(self) -> Any:
        value = self._random.choice(VALUES)
        return value() if callable(value) else copy.deepcopy(value)

    def _filled(self, path: str) -> str:
        for name in ("{model}", "{digest}", "{id}", "{file}"):
            if name in path:
                path = path.replace(name, self._random.choice(framing.NAMES))
        return path

    def _sent(self, kind: str, method: str, path: str, body: bytes, lines: str = "") -> Hostile:
        head = f"{method} {path} HTTP/1.1\r\nConnection: close\r\n{self.header}{lines}"
        if "\nhost:" not in head.lower():
            head += "Host: localhost\r\n"
        if body or method == "POST":
            head += f"Content-Length: {len(body)}\r\n"
            if "\ncontent-type:" not in head.lower():
                head += "Content-Type: application/json\r\n"
        data = head.encode("utf-8", "surrogateescape") + b"\r\n" + body
        # CONNECT, Expect and Upgrade may leave the server waiting for the client.
        waits = method == "CONNECT" or "expect" in lines.lower() or "upgrade" in lines.lower()
        return Hostile(kind, method, path, data, waits, "deadline" in lines.lower())


def _json(body: Body | None) -> bytes:
    """Return the body as JSON, with NaN and infinity as literals and lone surrogates as bytes."""
    if body is None:
        return b""
    try:
        return json.dumps(body).encode()
    except RecursionError:
        # Too deep for this encoder. The server must handle it nevertheless.
        return b"[" * 100_000 + b"]" * 100_000


def _places(value: Any, most: int = 400) -> list[tuple[Any, Any]]:
    """Return every position in a value as (container, key)."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < most:
        current = waiting.pop()
        for key in list(current) if isinstance(current, dict) else range(len(current)):
            found.append((current, key))
            if isinstance(current[key], dict | list):
                waiting.append(current[key])
    return found


_PARAMETERS = {
    "type": "object",
    "properties": {"zone": {"type": "string", "enum": ["utc"]}},
    "required": ["zone"],
}
_FUNCTION = {"name": "get_time", "description": "what time it is", "parameters": _PARAMETERS}
_CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": '{"zone": "utc"}'}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    {"role": "user", "content": [{"type": "text", "text": "Thanks"}]},
]
_TOOLS = [{"type": "function", "function": _FUNCTION}]
_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": _PARAMETERS, "strict": True}}
_OPTIONS = {"num_predict": 4, "temperature": 0, "seed": 1, "stop": ["w0009"], "num_ctx": 512}


def _body(path: str, model: str) -> Body:
    """Return a valid body for the route with many of its fields."""
    base = {"model": model}
    path = path.removeprefix("/v1") if path.startswith("/v1/api/") else path
    plain = [{**message} for message in _MESSAGES if isinstance(message["content"], str)]
    bodies: dict[str, Body] = {
        "/api/chat": {**base, "messages": plain, "tools": _TOOLS, "options": _OPTIONS, "stream": False,
                      "think": False, "keep_alive": "5m", "format": "", "truncate": True},
        "/api/generate": {**base, "prompt": "Hello", "suffix": "", "system": "s", "template": "",
        "context": [1],
                          "raw": False, "options": _OPTIONS, "stream": False, "images": []},
        "/api/embed": {**base, "input": ["a", "b"], "truncate": True, "dimensions": 8, "options": {}},
        "/api/embeddings": {**base, "prompt": "a"},
        "/api/show": {**base, "verbose": True},
        "/api/create": {"model": "made", "from": model, "parameters": _OPTIONS, "system": "s",
                        "template": "{{ .Prompt }}", "messages": plain[:2], "files": {"a.gguf": "sha256:00"}},
        "/api/copy": {"source": model, "destination": "other"},
        "/api/cluster/plan": {**base, "context": 512, "slots": 2, "count": 2, "strategy": "auto"},
        "/api/cluster/drain": {"node": "nobody", "drain": True},
        "/api/cluster/keys": {"name": "mine", "scope": "infer", "expires": "1d"},
        "/api/cluster/scan": {"hosts": ["127.0.0.1"], "port": 1},
        "/api/batch/embed": {**base, "input": ["a", "b"], "inputs": ["a"]},
        "/v1/chat/completions": {**base, "messages": _MESSAGES, "max_tokens": 4, "temperature": 0,
        "stream": True,
                                 "tools": _TOOLS, "tool_choice": "auto", "response_format": _FORMAT,
                                 "logprobs": True, "top_logprobs": 2, "stop": ["w0009"],
                                 "logit_bias": {"5": -1},
                                 "stream_options": {"include_usage": True}, "n": 1, "metadata": {}},
        "/v1/completions": {**base, "prompt": "Hello", "max_tokens": 4, "echo": False, "logprobs": 1, "n": 1,
                            "suffix": None, "stop": None, "stream": False},
        "/v1/embeddings": {**base, "input": ["a", [1, 2]], "encoding_format": "float", "dimensions": 8},
        "/v1/responses": {**base, "input": [{"role": "user", "content": "Hi"},
                                          {"type": "function_call", "call_id": "c", "name": "get_time",
                                           "arguments": "{}"},
                                          {"type": "function_call_output", "call_id": "c", "output": "noon"}],
                          "max_output_tokens": 4, "tools": [{"type": "function", **_FUNCTION}],
                          "stream": False,
                          "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low"},
                          "previous_response_id": None, "include": []},
        "/v1/messages": {**base, "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "stream": False,
                         "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                                      {"role": "assistant", "content": [
                                          {"type": "tool_use", "id": "t", "name": "get_time", "input": {}}]},
                                      {"role": "user", "content": [
                                          {"type": "tool_result", "tool_use_id": "t", "content": "noon"}]}],
                         "tools": [{"name": "get_time", "input_schema": _PARAMETERS}],
                         "thinking": {"type": "disabled"}, "stop_sequences": ["w0009"], "metadata": {}},
        "/v1/rerank": {**base, "query": "a", "documents": ["a", "b"], "top_n": 1},
        "/tokenize": {**base, "content": "Hello", "with_pieces": True, "add_special": True},
        "/detokenize": {**base, "tokens": [65, 66]},
        "/infill": {**base, "input_prefix": "a", "input_suffix": "b", "prompt": "", "n_predict": 4,
                    "input_extra": [{"filename": "a", "text": "b"}]},
    }  # fmt: skip
    bodies["/v1/messages/count_tokens"] = bodies["/v1/messages"]
    bodies["/rerank"] = bodies["/v1/rerank"]
    bodies["/apply-template"] = {**base, "messages": plain, "tools": _TOOLS}
    bodies["/api/cluster/load"] = bodies["/api/cluster/route"] = bodies["/api/cluster/plan"]
    return copy.deepcopy(bodies.get(path, {**base, "name": "nothing", "node": "nobody", "stream": False}))

"""A double of llama-server and Ollama that recites a known text token by token and can simulate failures."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

WORDS = tuple(f"w{n}é🙂 " if n % 7 == 3 else f"word{n} " for n in range(200))
TEXT = "".join(WORDS)


def count(text: str) -> int:
    """Return the number of tokens of ``text``, which must be a prefix of `TEXT`."""
    assert TEXT.startswith(text), text
    made = 0
    while text:
        text = text[len(WORDS[made]) :]
        made += 1
    return made


class Reciter:
    """One engine.

    ``cut_whole``: the next non-streamed answer breaks off in the middle. ``cut_error``: the next answer is an
    error response that breaks off. ``end_after``: events after which every streamed answer ends cleanly,
    without its last events. ``die_after``: events after which the connection is closed, once.
    ``hang_after``: events after which the engine hangs, once. ``poison``: the engine closes the connection of
    every request that contains this text, once ``fuse`` is set. ``deaf``: the engine ignores small requests.
    ``padding``: bytes of comments before each event. ``pings``: send comments while hanging. ``once``: close
    a connection on its second request. ``error_gate``: answers with ``status`` wait for it.
    ``unparsed_after``: events after which a streamed chat that may call tools ends with the error for a call
    that can't be parsed; ``partial_call``: part of the call is sent before.
    """

    def __init__(self) -> None:
        self.end_after: int | None = None
        self.unparsed_after: int | None = None
        self.partial_call = False
        self.die_after: int | None = None
        self.hang_after: int | None = None
        self.poison = ""
        self.error_gate = asyncio.Event()
        self.error_gate.set()
        self.fuse = asyncio.Event()
        self.fuse.set()
        self.deaths = 0
        self.on_death: Callable[[], None] = lambda: None
        self.deaf = False
        self.cut_whole = False
        self.cut_error = False
        self.pause = 0.0
        self.padding = 0
        self.pings = False
        self.once = False
        self._used: list[object] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.running = 0
        self.cancelled = 0
        self.status = 200
        self.error = ""
        """Error message of answers with ``status``. Default: the status number."""
        self.url = ""
        self.work = 0
        self.context = self.prompt = 0
        """The engine's context and the length of every prompt, in tokens. Context 0 means unlimited."""
        self._ids = itertools.count()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=2**30, middlewares=[self._close_kept])
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_post("/v1/completions", self.text)
        app.router.add_post("/completion", self.native)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/detokenize", self.aside)
        app.router.add_post("/apply-template", self.aside)
        app.router.add_post("/v1/chat/completions/input_tokens", self.aside)
        app.router.add_post("/api/chat", self.ollama)
        app.router.add_post("/api/generate", self.ollama)
        app.router.add_post("/v1/embeddings", self.embeddings)
        app.router.add_get("/slots", self.slots)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _close_kept(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.once and request.protocol in self._used:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        self._used.append(request.protocol)
        return await handler(request)

    async def slots(self, request: web.Request) -> web.Response:
        slot = {
            "id": 0,
            "id_task": 0,
            "n_prompt_tokens_processed": 0,
            "next_token": [{"n_decoded": self.work}],
        }
        return web.json_response([slot])

    async def tokenize(self, request: web.Request) -> web.Response:
        if self.deaf:
            await asyncio.Event().wait()
        text = (await request.json())["content"]
        if self.poison and self.poison in text:
            self._die(request)
        return web.json_response({"tokens": list(range(count(text)))})

    async def aside(self, request: web.Request) -> web.Response:
        return web.json_response({"path": request.path})

    async def embeddings(self, request: web.Request) -> web.Response:
        texts = (await request.json())["input"]
        texts = [texts] if isinstance(texts, str) else texts
        self.requests.append(("/v1/embeddings", {"input": texts}, {}))
        if "deadly" in texts:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        await self.gate.wait()
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        data = [{"index": n, "embedding": [float(len(text)), 1.0]} for n, text in enumerate(texts)]
        return web.json_response({"data": data, "usage": {"prompt_tokens": sum(len(t) for t in texts)}})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        messages = body["messages"]
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        if begun:
            assert body["continue_final_message"] == "content" and body["add_generation_prompt"] is False
        start, prompt = count(begun), sum(len(m["content"].split()) for m in messages)
        id, n = f"chatcmpl-{next(self._ids)}", itertools.count()

        def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
            choice = {"finish_reason": finish, "index": 0, "delta": delta}
            return {"choices": [choice], "created": 1000 + next(n), "id": id, "model": "m", "object": "chat"}

        made = self._made(body, start)
        finish = "length" if self._limited(body, start) else "stop"
        usage = self._usage(prompt, len(made))
        timings = {"prompt_n": prompt, "cache_n": 0, "predicted_n": len(made), "predicted_ms": 5.0}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(made)}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            return await self._whole(
                request, {"choices": [choice], "usage": usage, "id": id, "timings": timings}
            )
        events = [chunk({"role": "assistant", "content": None})]
        events += [chunk({"content": word}) for word in made]
        events += [chunk({}, finish)]
        if (body.get("stream_options") or {}).get("include_usage"):
            events.append({"choices": [], "id": id, "created": 1, "usage": usage, "timings": timings})
        if self.unparsed_after is not None and body.get("tool_choice") != "none":
            text = "The model produced output that does not match the expected peg-native format"
            call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a":'}}
            partial = [chunk({"tool_calls": [call]})] if self.partial_call else []
            events[self.unparsed_after :] = [*partial, {"error": {"code": 500, "message": text}}]
        return await self._sse(request, events, done="error" not in events[-1])

    async def text(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt = body["prompt"]
        begun = prompt.removeprefix("Say: ")
        start = count(begun)
        made = self._made(body, start)
        finish = "length" if self._limited(body, start) else "stop"
        id = f"cmpl-{next(self._ids)}"

        def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
            choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish}
            return {"choices": [choice], "created": 7, "id": id, "model": "m"}

        usage = self._usage(1 + start, len(made))
        if not body.get("stream"):
            return await self._whole(request, {**chunk("".join(made), finish), "usage": usage})
        last = {**chunk("", finish), "usage": usage}
        return await self._sse(request, [*(chunk(word) for word in made), last], done=True)

    async def native(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        prompt = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        begun = prompt[0].removeprefix("Say: ")
        start = count(begun) + len(prompt[1:])
        if prompt[1:]:
            assert prompt[1:] == list(range(count(begun), start))
        made = self._made(body, start)
        events: list[dict[str, Any]] = [
            {"content": word, "tokens": [start + n], "stop": False, "tokens_predicted": n + 1}
            for n, word in enumerate(made)
        ]
        end = {"content": "", "tokens": [], "stop": True, "tokens_predicted": len(made), "prompt": "x"}
        events.append({**end, "stop_type": "limit" if self._limited(body, start) else "eos"})
        return await self._sse(request, events, done=False)

    async def ollama(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        generate = request.path == "/api/generate"
        if generate:
            begun = body["prompt"].removeprefix("Say: ") if body.get("raw") else ""
        else:
            last = body["messages"][-1]
            begun = last["content"] if last["role"] == "assistant" else ""
        start = count(begun)
        body = {**body, "max_tokens": (body.get("options") or {}).get("num_predict")}
        made = self._made(body, start)

        def line(text: str, **more: Any) -> bytes:
            record: dict[str, Any] = (
                {"response": text} if generate else {"message": {"role": "assistant", "content": text}}
            )
            return (
                json.dumps({"model": "m", "created_at": "now", **record, "done": False, **more}).encode()
                + b"\n"
            )

        reason = "length" if self._limited(body, start) else "stop"
        end = {"done": True, "done_reason": reason, "eval_count": len(made), "eval_duration": 10**6}
        if body.get("stream") is False:
            return web.Response(body=line("".join(made), **end))
        lines = [line(word) for word in made] + [line("", **end)]
        return await self._send(request, lines, "application/x-ndjson")

    async def _body(self, request: web.Request) -> dict[str, Any]:
        body = await request.json()
        self.requests.append((request.path, body, dict(request.headers)))
        if self.poison and self.poison in json.dumps(body):
            await self.fuse.wait()
            self._die(request)
        if self.cut_error:
            self.cut_error = False
            await self._cut(request, 500)
        if (status := self.status) != 200:
            await self.error_gate.wait()
            error_text = self.error or f"status {status}"
            error = json.dumps({"error": {"message": error_text, "code": status}})
            raise _status(status, error)
        if self.context and self.prompt >= self.context:
            message = (
                f"request ({self.prompt} tokens) exceeds the available context size "
                f"({self.context} tokens), try increasing it"
            )
            raise _status(400, json.dumps({"error": {"message": message, "code": 400}}))
        return dict(body)

    def _die(self, request: web.Request) -> None:
        self.deaths += 1
        self.on_death()
        assert request.transport is not None
        request.transport.abort()

    def _limit(self, body: dict[str, Any]) -> int | None:
        limits = [body[key] for key in ("max_tokens", "n_predict") if body.get(key) is not None]
        # llama-server generates at least one token.
        return max(1, min(limits)) if limits else None

    def _made(self, body: dict[str, Any], start: int) -> tuple[str, ...]:
        limit = self._limit(body)
        words = WORDS[start:] if limit is None else WORDS[start : start + limit]
        stop = body.get("stop")
        if stop:
            for n, word in enumerate(words):
                if stop in word:
                    return words[:n]
        return words

    def _limited(self, body: dict[str, Any], start: int) -> bool:
        limit = self._limit(body)
        return limit is not None and len(self._made(body, start)) == limit

    def _usage(self, prompt: int, made: int) -> dict[str, int]:
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    async def _whole(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.running += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if self.cut_whole:
            self.cut_whole = False
            return await self._cut(request, 200)
        return web.json_response(body)

    async def _cut(self, request: web.Request, status: int) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Length": "1000000"})
        await response.prepare(request)
        await response.write(b'{"choices":')
        await asyncio.sleep(0.01)
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _sse(
        self, request: web.Request, events: list[dict[str, Any]], *, done: bool
    ) -> web.StreamResponse:
        lines = [b"data: " + json.dumps(e, separators=(",", ":")).encode() + b"\n\n" for e in events]
        if done:
            lines.append(b"data: [DONE]\n\n")
        return await self._send(request, lines, "text/event-stream")

    async def _send(self, request: web.Request, lines: list[bytes], kind: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": kind})
        await response.prepare(request)
        self.running += 1
        try:
            for n, line in enumerate(lines):
                await self.gate.wait()
                if self.end_after is not None and n >= self.end_after:
                    await response.write_eof()
                    return response
                if self.die_after is not None and n >= self.die_after:
                    self.die_after = None
                    assert request.transport is not None
                    # The events sent so far arrive, followed by half of the next line.
                    await asyncio.sleep(0.01)
                    await response.write(line[: len(line) // 2])
                    request.transport.abort()
                    return response
                if self.hang_after is not None and n >= self.hang_after:
                    self.hang_after = None
                    while self.pings:
                        await response.write(b":\n\n")
                        await asyncio.sleep(0.05)
                    await asyncio.Event().wait()
                if self.padding:
                    await response.write(b": " + b"." * self.padding + b"\n\n")
                await response.write(line)
                if self.pause:
                    await asyncio.sleep(self.pause)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return response


def _status(status: int, text: str) -> web.HTTPException:
    classes = {400: web.HTTPBadRequest, 500: web.HTTPInternalServerError, 503: web.HTTPServiceUnavailable}
    return classes[status](text=text, content_type="application/json")

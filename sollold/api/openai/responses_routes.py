"""``/v1/responses``: OpenAI's newer API."""

from __future__ import annotations

from functools import partial

import msgspec
from aiohttp import web
from msgspec.structs import replace

from sollold.api.engine.calls import CHAT_PATH, chat_calls, ollama_body
from sollold.api.engine.count import count_ask, read_count
from sollold.api.engine.encoders import Event, EventEncoder, PassThroughEncoder
from sollold.api.engine.fields import require_completion, require_model
from sollold.api.engine.ignored_fields import context_note, tool_notes
from sollold.api.engine.left_out import left_out_warnings
from sollold.api.engine.modelfile import without_modelfile
from sollold.api.engine.placement import find_placed
from sollold.api.engine.truncate import TruncatingService
from sollold.api.engine.v1_ask import v1_ask
from sollold.api.http.access import holder_of
from sollold.api.http.body import as_type, read_object
from sollold.api.http.caller import prefix_of
from sollold.api.http.errors import Dialect
from sollold.api.http.response import Reply, ResponseContext, json_response
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices
from sollold.api.openai.pages import item_page, listed_items
from sollold.api.openai.responses_ask import ResponseAsk
from sollold.api.openai.responses_events import ResponseEvents
from sollold.api.openai.responses_request import response_body, response_warnings
from sollold.api.openai.responses_tools import own_tools
from sollold.control.responses import StoredResponse, input_id
from sollold.errors import Fault, Refusal, bad_request
from sollold.serving.request import Call

_MAX_REFERENCED_BYTES = 24 << 20
"""Maximum bytes of all referenced items, as JSON: as much as a request that contains them may have."""


class ResponsesRoutes:
    """The handlers of ``/v1/responses``."""

    def __init__(self, services: AppServices, context: ResponseContext) -> None:
        self._services = services
        self._context = context

    def routes(self) -> list[Route]:
        """Return the route table."""
        sse = ("application/json", "text/event-stream")
        path = "/v1/responses/{id}"
        count = partial(Route, inference=True)
        ask = partial(count, produces=sse)
        return [
            ask("POST", "/v1/responses", self._create, "Create a response", ResponseAsk),
            count("POST", "/v1/responses/input_tokens", self._count, "Count an input's tokens", ResponseAsk),
            Route("GET", path, self._show, "A recent response"),
            Route("DELETE", path, self._delete, "Delete a stored response"),
            Route(
                "GET",
                path + "/input_items",
                self._input_items,
                "The input of a recent response",
                query=(
                    ("limit", "Maximum number of items, from 1 to 100; default 20"),
                    ("order", "asc or desc; default desc"),
                    ("after", "Id of the item after which the page begins"),
                ),
                string_query=("order", "after"),
            ),
            Route("POST", path + "/cancel", self._cancel, "Refused: nothing runs in the background"),
            Route("POST", "/v1/responses/compact", self._compact, "Refused: use truncation"),
        ]

    async def _create(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        parsed = as_type(body, ResponseAsk)
        listed = await find_placed(request, self._services, parsed.placement, parsed.model)
        parsed.model = parsed.model or listed.model.name
        require_completion(listed.model, "responses")
        holder = holder_of(request)
        expanded, items = await self._expand(parsed, holder)
        engine = response_body(expanded, listed.model)
        plain = response_body(expanded, without_modelfile(listed.model))
        messages = engine["messages"]
        notes = (*response_warnings(body, expanded), *left_out_warnings(messages))
        ollama = ollama_body({**plain, "model": parsed.model}, listed.model)
        native = Call(CHAT_PATH, ollama, (*notes, *tool_notes(ollama), *context_note(parsed.num_ctx)))
        calls = partial(chat_calls, listed.model, llama=lambda: engine, ollama=native)
        prefix = prefix_of(messages)
        ask, prepared = await v1_ask(request, body, parsed, listed, calls, stream=True, prefix=prefix)
        responses = self._services.responses

        def keep(response: Event) -> None:
            if parsed.store is not False:
                responses.put(StoredResponse(response, items, parsed.previous_response_id or "", holder))

        def encoder() -> EventEncoder:
            events = ResponseEvents(parsed, own_tools(expanded), responses.new_id, keep)
            return EventEncoder(events, Dialect.OPENAI, b"data: [DONE]\n\n")

        gather = None if parsed.stream else encoder
        warnings = (*notes, *prepared.warnings)
        context = self._context
        if parsed.truncation == "auto":
            context = replace(context, service=TruncatingService(context.service))
        reply = Reply(
            request, context, ask, encoder(), gather=gather, warnings=warnings, too_long_in_stream=True
        )
        return await reply.run()

    async def _count(self, request: web.Request) -> web.StreamResponse:
        body = await read_object(request)
        parsed = as_type(body, ResponseAsk)
        listed = await self._services.library.find(require_model(parsed.model))
        expanded, _ = await self._expand(parsed, holder_of(request))
        plain = {**response_body(expanded, without_modelfile(listed.model)), "model": parsed.model}
        engine = response_body(expanded, listed.model)
        ask = await count_ask(request, body, parsed, listed, engine, plain)
        warnings = response_warnings(body, expanded)
        encoder = PassThroughEncoder(_count_response)
        return await Reply(request, self._context, ask, encoder, warnings=warnings).run()

    async def _expand(self, parsed: ResponseAsk, holder: str) -> tuple[ResponseAsk, list[Event]]:
        """Return the request with the conversation that it continues, and its own items.

        Raises:
            Refusal: BAD_REQUEST if a referenced item or response no longer exists.
        """
        items = await self._with_references(parsed.input, holder)
        history = await self._history(parsed.previous_response_id, holder)
        conversation = [*history, *items] if history else items
        return replace(parsed, input=conversation, previous_response_id=None), items

    async def _with_references(self, source: str | list[Event] | None, client: str) -> list[Event]:
        """Return the items of an input, with references to earlier items resolved.

        Raises:
            Refusal: BAD_REQUEST with status 404 if a referenced item no longer exists, 413 if the referenced
                items are too long together.
        """
        if isinstance(source, str):
            return [{"role": "user", "content": source}] if source else []
        items = source or []
        ids = [item["id"] if _is_reference(item) else "" for item in items]
        found = await self._services.responses.items(filter(None, ids), client)
        sizes = {id_: len(msgspec.json.encode(found[id_])) for id_ in {*ids} & found.keys()}
        if sum(sizes.get(id_, 0) for id_ in ids) > _MAX_REFERENCED_BYTES:
            message = f"the items that are referenced are longer than {_MAX_REFERENCED_BYTES} bytes together"
            raise bad_request(message, status=413)
        for id_ in filter(None, ids):
            if id_ not in found:
                raise bad_request(f"Item with id '{id_[:100]}' not found.", status=404)
        return [found[id_] if id_ else item for id_, item in zip(ids, items, strict=True)]

    async def _history(self, id_: str | None, client: str) -> list[Event]:
        """Return the conversation up to and including the response ``id_``.

        Raises:
            Refusal: BAD_REQUEST if it no longer exists.
        """
        if not id_:
            return []
        history = await self._services.responses.conversation(id_, client)
        if history is None:
            message = f"Previous response with id '{id_[:100]}' not found. Send the whole conversation."
            field, code = "previous_response_id", "previous_response_not_found"
            raise Refusal(Fault.BAD_REQUEST, message, field=field, code=code)
        return history

    async def _stored(self, request: web.Request, *, delete: bool = False) -> StoredResponse:
        id_ = request.match_info["id"]
        found = await self._services.responses.get(id_, holder_of(request), delete=delete)
        if found is None or found.response["id"] != id_:
            raise bad_request(f"Response with id '{id_[:100]}' not found.", status=404)
        return found

    async def _show(self, request: web.Request) -> web.Response:
        if request.query.get("stream", "false").lower() not in ("false", "0"):
            raise bad_request("stream is not supported here: the response is complete, omit stream")
        return json_response((await self._stored(request)).response)

    async def _delete(self, request: web.Request) -> web.Response:
        found = await self._stored(request, delete=True)
        return json_response({"id": found.response["id"], "object": "response", "deleted": True})

    async def _input_items(self, request: web.Request) -> web.Response:
        stored = await self._stored(request)
        items = listed_items(stored.items, partial(input_id, str(stored.response["id"])))
        return json_response(item_page(items, request.query))

    async def _cancel(self, request: web.Request) -> web.Response:
        await self._stored(request)
        raise bad_request(
            "Cannot cancel a synchronous response: it is complete. "
            "To end one in progress, close its connection"
        )

    async def _compact(self, request: web.Request) -> web.Response:
        raise bad_request(
            "compact is not supported: ask a model to summarise the conversation, "
            "or send it with truncation set to auto"
        )


def _count_response(raw: bytes) -> bytes:
    return msgspec.json.encode({"object": "response.input_tokens", "input_tokens": read_count(raw)})


def _is_reference(item: Event) -> bool:
    """Whether an item is a reference; its type may be missing, and it then has no role either."""
    kind = item.get("type")
    named = isinstance(item.get("id"), str) and item["id"] != ""
    return named and (kind == "item_reference" or (kind is None and "role" not in item))

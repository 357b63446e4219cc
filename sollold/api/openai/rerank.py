"""``/v1/rerank`` in the forms of Jina and Cohere, whose clients are used with it. Pure."""

from __future__ import annotations

from typing import Any

from sollold.api.engine.chunks import edit_each
from sollold.api.engine.number_ranges import Count
from sollold.api.engine.placement import V1Fields
from sollold.errors import bad_request


class Rerank(V1Fields, kw_only=True):
    """``POST /v1/rerank``."""

    query: str | dict[str, Any] | None = None
    documents: list[str | dict[str, Any]] | None = None
    texts: list[str] | None = None
    top_n: Count | None = None
    return_documents: bool | None = None


def rerank_body(body: dict[str, Any], ask: Rerank) -> dict[str, Any]:
    """Return the body for llama-server, which accepts only strings as documents.

    Raises:
        Refusal: BAD_REQUEST.
    """
    query = _text_of(ask.query, "query") if ask.query else ""
    if not query or not (ask.documents or ask.texts):
        raise bad_request("query and documents are required")
    out = {key: value for key, value in body.items() if key != "return_documents"}
    out["query"] = query
    if ask.documents:
        out["documents"] = [_text_of(document, "a document") for document in ask.documents]
    if ask.top_n is not None:
        out["top_n"] = ask.top_n
    return out


def _text_of(value: str | dict[str, Any], subject: str) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise bad_request(f"{subject} must be a string, or an object with a text")
    return text


def with_documents(raw: bytes, documents: list[str]) -> bytes:
    """Return the response with the document added to each result; unchanged if it can't be parsed."""

    def add(result: dict[str, Any]) -> None:
        result["document"] = {"text": documents[result["index"]]}

    return edit_each(raw, add, "results")

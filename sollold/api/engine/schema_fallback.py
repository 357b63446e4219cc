"""Retries without enforcing the tools' schemas if llama.cpp rejects one; a format's schema is refused."""

from __future__ import annotations

from dataclasses import replace

from sollold.api.engine.retry import RevisingService
from sollold.api.engine.tools import unconstrained_tool
from sollold.errors import Fault, Refusal
from sollold.serving.request import Ask, Call, Engine

_SIGNS = (
    "JSON schema error",
    "JSON schema conversion failed",
    "failed to parse grammar",
    "Failed to parse tools",
)


class SchemaFallbackService(RevisingService):
    """Retries with unconstrained arguments for the tools, and their schemas in the descriptions."""

    tries = 1

    async def _revised(self, ask: Ask, refusal: Refusal, attempt: int) -> Ask | None:
        call = ask.calls.get(Engine.LLAMA)
        if call is None or not _is_schema_refusal(refusal.message) or not call.body.get("tools"):
            return None
        tools = [unconstrained_tool(tool) for tool in call.body["tools"]]
        body = {**call.body, "tools": tools}
        return replace(ask, calls={**ask.calls, Engine.LLAMA: Call(call.path, body)})

    def _final(self, refusal: Refusal) -> Refusal:
        if not _is_schema_refusal(refusal.message):
            return refusal
        reason = refusal.message.rsplit("failed:", 1)[-1].split("; tools =")[0]
        return Refusal(Fault.BAD_REQUEST, f"the schema can't be enforced: {' '.join(reason.split())[:300]}")

    def _warnings(self, first: Ask, last: Ask) -> tuple[str, ...]:
        return ("the schemas of the tools are not enforced: llama.cpp can't convert one of them",)


def _is_schema_refusal(message: str) -> bool:
    return any(sign in message for sign in _SIGNS)

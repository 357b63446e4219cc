"""A `Service` that makes engines accept more requests; the services that it combines describe the cases."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from sollold.api.engine.cached_images import CachedImagesService
from sollold.api.engine.forced_tool import ForcedToolService
from sollold.api.engine.format_beside_tools import FormatBesideToolsService
from sollold.api.engine.schema_fallback import SchemaFallbackService
from sollold.api.engine.template_fallback import TemplateFallbackService
from sollold.api.engine.tool_text import ToolTextService
from sollold.serving.request import Answer, Ask, Service, Waiting


class TolerantService:
    """Combines the services that retry; those that concern only tools are used by requests with tools."""

    def __init__(self, service: Service) -> None:
        self._plain = TemplateFallbackService(SchemaFallbackService(CachedImagesService(service)))
        self._with_tools = FormatBesideToolsService(ForcedToolService(ToolTextService(self._plain)))

    def open(self, ask: Ask, on_wait: Callable[[Waiting], None]) -> Coroutine[Any, Any, Answer]:
        """As `Service.open`."""
        has_tools = any(call.body.get("tools") for call in ask.calls.values())
        return (self._with_tools if has_tools else self._plain).open(ask, on_wait)

"""Spans of a request across nodes, exported to an OTLP collector (OpenTelemetry).

Tracing is off until `start` is called; each function then costs one comparison. A span on another node
receives the caller's ``traceparent`` (W3C Trace Context).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sollold import __version__
from sollold.facts import dataclass
from sollold.web_proxy import BadProxy, proxy_for

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger("sollold")

Value = str | int | float | bool
_FLUSH_MILLISECONDS = 2000


NEEDED = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
"""Packages that the wheel's extra ``traces`` installs."""


class TracesUnavailable(Exception):
    """The packages for exporting traces are not installed."""


@dataclass(slots=True)
class _State:
    tracer: Tracer | None = None


_state = _State()


def installed() -> bool:
    """Return whether traces can be exported: the extra ``traces`` is installed."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def start(url: str, node: str) -> Callable[[], None]:
    """Export traces to the collector at ``url`` (``http://host:4318``).

    Returns a function that stops the export; it blocks while it flushes.

    ``node``: this node's name, set on its spans.

    Raises:
        TracesUnavailable: the packages are not installed.
    """
    if not installed():
        raise TracesUnavailable(
            f"log.traces needs OpenTelemetry, which is not installed: pipx inject sollold {NEEDED} "
            "(not possible with the Debian package)"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from requests import Session

    session = Session()
    # requests' own proxy rules support neither networks in NO_PROXY nor direct requests to this machine.
    session.trust_env = False
    try:
        if (proxy := proxy_for(url)) is not None:
            session.proxies = {urlsplit(url).scheme: proxy.url}
    except BadProxy as error:
        log.warning("traces are sent without a proxy: %s", error)
    facts = {"service.name": "sollold", "service.version": __version__, "service.instance.id": node}
    provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{url.rstrip('/')}/v1/traces", timeout=5, session=session)
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
    _state.tracer = provider.get_tracer("sollold", __version__)

    def end() -> None:
        _state.tracer = None
        provider.force_flush(_FLUSH_MILLISECONDS)
        provider.shutdown()

    return end


def on() -> bool:
    """Return whether traces are being exported."""
    return _state.tracer is not None


class Traced:
    """A span, or a no-op while tracing is off."""

    __slots__ = ("_span",)

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Record an event at this moment."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def end(self, error: str = "") -> None:
        """End the span; a non-empty ``error`` marks it as failed."""
        if self._span is not None:
            _set_error(self._span, error)
            self._span.end()


_OFF = Traced(None)


@contextlib.contextmanager
def span(name: str, attributes: Mapping[str, Value], parent: str = "") -> Iterator[Traced]:
    """Open a span around the block, the parent of those opened within; ``parent``: another node's span."""
    tracer = _state.tracer
    if tracer is None:
        yield _OFF
        return
    from opentelemetry.trace import use_span

    opened = _start_span(tracer, name, attributes, parent)
    with use_span(opened, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield Traced(opened)
        except Exception as error:
            _set_error(opened, str(error) or type(error).__name__)
            raise


def begin(name: str, attributes: Mapping[str, Value], parent: str = "") -> Traced:
    """Start a span that the caller must end; it does not become the parent of other spans."""
    tracer = _state.tracer
    return _OFF if tracer is None else Traced(_start_span(tracer, name, attributes, parent))


def current() -> Traced:
    """Return the enclosing span."""
    if _state.tracer is None:
        return _OFF
    from opentelemetry.trace import get_current_span

    return Traced(get_current_span())


def traceparent() -> str:
    """Return the ``traceparent`` header for outgoing requests; empty while tracing is off."""
    if _state.tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def _start_span(tracer: Tracer, name: str, attributes: Mapping[str, Value], parent: str) -> Span:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    return tracer.start_span(name, context, attributes=attributes)


def _set_error(span: Span, error: str) -> None:
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error[:500]))

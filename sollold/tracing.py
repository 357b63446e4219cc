"""Spans of a request on its way over nodes, for a collector that speaks OTLP (OpenTelemetry).

Off until `start` is called; what is here costs a comparison then. A span that begins on another node is given
the ``traceparent`` (W3C Trace Context) of the one that asked for it.
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
"""What the extra ``traces`` of the wheel installs."""


class TracesUnavailable(Exception):
    """The package that sends traces is not installed."""


@dataclass(slots=True)
class _State:
    tracer: Tracer | None = None


_state = _State()


def installed() -> bool:
    """Whether traces can be sent: the extra ``traces`` is installed."""
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


def start(url: str, node: str) -> Callable[[], None]:
    """Send traces to the collector at ``url`` (``http://host:4318``). The answer ends that; it blocks.

    ``node``: this node's name, which its spans carry.

    Raises:
        TracesUnavailable: the package for it is not installed.
    """
    if not installed():
        raise TracesUnavailable(
            f"log.traces needs OpenTelemetry, which is not installed: pipx inject sollold {NEEDED} "
            "(the Debian package has no place for it)"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from requests import Session

    session = Session()
    # Its own rules know neither networks in NO_PROXY nor that this machine is not asked through a proxy.
    session.trust_env = False
    try:
        if (proxy := proxy_for(url)) is not None:
            session.proxies = {urlsplit(url).scheme: proxy.url}
    except BadProxy as error:
        log.warning("traces are sent directly: %s", error)
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
    """Whether traces are sent."""
    return _state.tracer is not None


class Traced:
    """One span; of one that is off nothing is kept."""

    __slots__ = ("_span",)

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def set(self, attributes: Mapping[str, Value]) -> None:
        """Add attributes."""
        if self._span is not None:
            self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Mapping[str, Value]) -> None:
        """Something happened at this moment."""
        if self._span is not None:
            self._span.add_event(name, attributes)

    def end(self, error: str = "") -> None:
        """It is over; ``error``: and failed, so."""
        if self._span is not None:
            _set_error(self._span, error)
            self._span.end()


_OFF = Traced(None)


@contextlib.contextmanager
def span(name: str, attributes: Mapping[str, Value], parent: str = "") -> Iterator[Traced]:
    """A span around the block; those within are its parts. ``parent``: a ``traceparent`` from elsewhere."""
    tracer = _state.tracer
    if tracer is None:
        yield _OFF
        return
    from opentelemetry.trace import use_span

    made = _begun(tracer, name, attributes, parent)
    with use_span(made, end_on_exit=True, record_exception=False, set_status_on_exception=False):
        try:
            yield Traced(made)
        except Exception as error:
            _set_error(made, str(error) or type(error).__name__)
            raise


def begin(name: str, attributes: Mapping[str, Value], parent: str = "") -> Traced:
    """A span that its caller ends; nothing becomes a part of it."""
    tracer = _state.tracer
    return _OFF if tracer is None else Traced(_begun(tracer, name, attributes, parent))


def current() -> Traced:
    """The span that this is a part of."""
    if _state.tracer is None:
        return _OFF
    from opentelemetry.trace import get_current_span

    return Traced(get_current_span())


def traceparent() -> str:
    """The header for what is asked of others; empty when nothing is traced."""
    if _state.tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def _begun(tracer: Tracer, name: str, attributes: Mapping[str, Value], parent: str) -> Span:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent}) if parent else None
    return tracer.start_span(name, context, attributes=attributes)


def _set_error(span: Span, error: str) -> None:
    if error:
        from opentelemetry.trace import Status, StatusCode

        span.set_status(Status(StatusCode.ERROR, error[:500]))

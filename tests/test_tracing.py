"""Spans of a request from all nodes involved, as exported to a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sollold import tracing
from sollold.engines.install.find import Llama
from sollold.models.gguf import demo_model
from tests.daemons import Cluster, until


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """A span as the collector received it."""

    node: str
    name: str
    trace: bytes
    id: bytes
    parent: bytes
    attributes: dict[str, str]


@dataclass
class Collector:
    """Decodes the spans that an exporter sends.

    Attributes:
        url: where the fixture's HTTP server listens.
    """

    url: str = ""
    spans: list[ReceivedSpan] = field(default_factory=list)

    def named(self, name: str) -> ReceivedSpan | None:
        return next((span for span in self.spans if span.name == name), None)

    def receive(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            resource = {
                attribute.key: attribute.value.string_value for attribute in group.resource.attributes
            }
            for scope in group.scope_spans:
                for span in scope.spans:
                    attributes = {
                        item.key: item.value.string_value or str(item.value.int_value)
                        for item in span.attributes
                    }
                    node = resource["service.instance.id"]
                    parts = (span.trace_id, span.span_id, span.parent_span_id)
                    self.spans.append(ReceivedSpan(node, span.name, *parts, attributes))


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            found.receive(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()


def test_spans_without_tracing_do_nothing() -> None:
    with tracing.span("a", {"b": 1}) as span:
        span.set({"c": 2})
        tracing.current().event("d", {})
        assert tracing.traceparent() == ""
    tracing.begin("e", {}).end("failed")


def test_spans_have_the_right_trace_and_parent(collector: Collector) -> None:
    end = tracing.start(collector.url, "here")
    try:
        with pytest.raises(ValueError), tracing.span("outer", {}):
            parent = tracing.traceparent()
            tracing.begin("far", {"x": 1}, parent).end("broke off")
            raise ValueError("no")
        with tracing.span("continued", {}, "00-" + "1" * 32 + "-" + "2" * 16 + "-01"):
            pass
        with tracing.span("new root", {}, "nonsense"):
            pass
    finally:
        end()
    outer, far = collector.named("outer"), collector.named("far")
    assert outer is not None and far is not None
    assert (far.trace, far.parent, far.attributes) == (outer.trace, outer.id, {"x": "1"})
    continued, root = collector.named("continued"), collector.named("new root")
    assert continued is not None and continued.trace.hex() == "1" * 32
    assert root is not None and root.parent == b""
    assert tracing.traceparent() == ""


def test_a_collector_on_this_machine_is_reached_without_the_proxy(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    end = tracing.start(collector.url, "here")
    with tracing.span("direct", {}):
        pass
    end()
    assert collector.named("direct") is not None


@pytest.mark.llama
@pytest.mark.cluster
def test_a_request_is_traced_across_nodes(tmp_path: Path, llama: Llama, collector: Collector) -> None:
    settings = {"log.traces": collector.url}
    with Cluster(2, tmp_path, llama, settings=settings, start=False, loopback=True) as cluster:
        demo_model.write(cluster[0].models / "demo.gguf")
        for node in cluster:
            node.start()
        cluster.together()
        chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": False}
        until(lambda: b"demo" in cluster[1].ask("GET", "/api/tags").body, "the model is known")
        given = f"00-{'a' * 32}-{'b' * 16}-01"
        reply = cluster[1].ask("POST", "/api/chat", chat, headers={"traceparent": given})
        assert reply.status == 200, reply.body
        until(
            lambda: {"POST /api/chat", "load", "engine"} <= {span.name for span in collector.spans}, "spans"
        )
    root, load, engine = (collector.named(name) for name in ("POST /api/chat", "load", "engine"))
    assert root is not None and load is not None and engine is not None
    assert (root.node, load.node, engine.node) == ("node1", "node1", "node0")
    assert root.trace.hex() == "a" * 32 and root.parent.hex() == "b" * 16
    assert load.parent == engine.parent == root.id
    assert root.attributes["gen_ai.request.model"] == "demo:latest"
    assert root.attributes["sollold.node"] == "node0"
    assert int(root.attributes["gen_ai.usage.output_tokens"]) > 0
    assert root.attributes["http.response.status_code"] == "200"
    assert root.attributes["http.route"] == "/api/chat"

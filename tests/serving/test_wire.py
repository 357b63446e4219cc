"""Frames and events split at any position."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sollold.serving.event_reader import EventReader, EventSplitter
from sollold.serving.protocol import BadFrame, Frames, frame
from sollold.serving.request import Call, Engine
from sollold.serving.resume.select import continuation_for


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=40)), max_size=20),
    st.lists(st.integers(0, 2000), max_size=20),
)
def test_frames_survive_any_split(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    data = b"".join(frame(kind, payload) for kind, payload in sent)
    frames = Frames()
    got = [received for piece in pieces(data, cuts) for received in frames.feed(piece)]
    assert got == sent


@given(st.binary(max_size=200))
def test_random_bytes_raise_only_the_frame_error(data: bytes) -> None:
    with contextlib.suppress(BadFrame):
        Frames().feed(data)


def test_an_oversized_frame_is_refused() -> None:
    with pytest.raises(BadFrame):
        Frames().feed(b"d\xff\xff\xff\xff")


TEXTS = st.lists(st.text(alphabet='ab{}":,é🙂 \\', min_size=1, max_size=12), max_size=15)


@given(TEXTS, st.lists(st.integers(0, 3000), max_size=20), st.booleans())
def test_events_survive_any_split(texts: list[str], cuts: list[int], pings: bool) -> None:
    payloads = [b"{" + text.encode() + b"}" for text in texts]
    data = b"".join((b":\n\n" if pings else b"") + b"data: " + p + b"\n\n" for p in payloads)
    data += b"data: [DONE]\n\n"
    events = EventSplitter(Engine.LLAMA, "/v1/chat/completions")
    got = [event for piece in pieces(data, cuts) for event in events.feed(piece)]
    assert got + events.finish() == payloads
    assert events.done


@given(TEXTS, st.lists(st.integers(0, 3000), max_size=20), st.booleans())
def test_lines_survive_any_split(texts: list[str], cuts: list[int], last_newline: bool) -> None:
    payloads = [b"{" + text.encode() + b"}" for text in texts] + [b'{"done":true}']
    data = b"\n".join(payloads) + (b"\n" if last_newline else b"")
    events = EventSplitter(Engine.OLLAMA, "/api/chat")
    got = [event for piece in pieces(data, cuts) for event in events.feed(piece)]
    assert got + events.finish() == payloads
    assert events.done


@pytest.mark.parametrize(
    ("engine", "path", "data"),
    [
        (Engine.LLAMA, "/v1/chat/completions", b'data: {"a":1}\n\n'),
        (Engine.LLAMA, "/completion", b'data: {"stop":false}\n\n'),
        (Engine.OLLAMA, "/api/chat", b'{"done":false}\n'),
        (Engine.OLLAMA, "/api/chat", b'{"done":fal'),
        (Engine.OLLAMA, "/api/chat", b'{"message":{"tool_calls":[{"a":{"done":true}}]},"done":false}\n'),
        (Engine.LLAMA, "/v1/messages", b'event: ping\ndata: {"type":"ping"}\n\n'),
    ],
)
def test_a_stream_without_its_final_event_is_not_done(engine: Engine, path: str, data: bytes) -> None:
    events = EventSplitter(engine, path)
    events.feed(data)
    events.finish()
    assert not events.done


def test_the_data_of_named_events_is_kept() -> None:
    events = EventSplitter(Engine.LLAMA, "/v1/messages")
    got = events.feed(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert got == [b'{"type":"message_stop"}']
    assert events.finish() == []
    assert events.done


@pytest.mark.parametrize(
    ("fields", "whole"), [(["content"], True), (["content", "stop"], False), ([], False)]
)
def test_a_last_event_without_its_mark_ends_an_answer_whose_fields_were_chosen(
    fields: list[str], whole: bool
) -> None:
    call = Call("/completion", {"prompt": "a", "response_fields": fields})
    attempt: Any = SimpleNamespace(candidate=SimpleNamespace(engine=Engine.LLAMA), call=call)
    reader = EventReader(attempt, continuation_for(Engine.LLAMA, call))
    assert len(reader.feed(b'data: {"content":"x","stop":false}\n\ndata: {"content":""}\n\n')) == 2
    assert not reader.finish()
    assert reader.whole is whole

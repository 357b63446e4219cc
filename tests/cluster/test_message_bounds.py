"""Texts, lists and numbers in the messages of strangers, and those about the secret, have limits."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from msgspec import inspect

from sollold.cluster.admission import exchange, invitation, orders
from sollold.cluster.admission.keyring import Keyring
from sollold.cluster.gossip import packet
from sollold.cluster.net import link_messages
from sollold.cluster.net.rpc import PeerError
from sollold.control import member_pass

MESSAGES: list[type] = [
    exchange.Hello,
    exchange.Greeting,
    exchange.Request,
    exchange.Answer,
    invitation.Opening,
    invitation.Reply,
    invitation.Proof,
    invitation.Outcome,
    orders.AdmitOrder,
    orders.DoorOrder,
    orders.SecretOrder,
    orders.SecretAnswer,
    member_pass.PassRequest,
    packet.Packet,
    packet.PushPull,
    link_messages.Hello,
]


def unbounded(kind: inspect.Type, path: str) -> Iterator[str]:
    """Yield the paths of values without a limit, at any depth."""
    match kind:
        case inspect.Metadata():
            yield from unbounded(kind.type, path)
        case inspect.StructType() | inspect.DataclassType():
            for field in kind.fields:
                yield from unbounded(field.type, f"{path}.{field.name}")
        case inspect.StrType() | inspect.BytesType() if kind.max_length is None:
            yield path
        case inspect.VarTupleType() | inspect.ListType():
            if kind.max_length is None:
                yield path
            yield from unbounded(kind.item_type, f"{path}[]")
        case inspect.TupleType():
            for item in kind.item_types:
                yield from unbounded(item, f"{path}[]")
        case inspect.UnionType():
            for item in kind.types:
                yield from unbounded(item, path)
        case inspect.IntType() if kind.le is None and kind.lt is None:
            yield path


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__qualname__)
def test_each_value_has_a_limit(message: type) -> None:
    assert list(unbounded(inspect.type_info(message), message.__name__)) == []


@pytest.mark.parametrize("founder", ["a" * 17, "a" * 16 + "\n", "A" * 16, "x" * 16, "a" * 15])
def test_an_answer_with_an_impossible_founder_is_refused(founder: str) -> None:
    def answered(founder: str) -> Keyring:
        body = msgspec.msgpack.encode(
            exchange.Answer(exchange.AdmissionState.ADMITTED, "5e" * 32, founder, 1.0)
        )
        return exchange.decoded(body, exchange.Answer).keyring("b" * 16)

    assert answered("a" * 16).founder == "a" * 16
    with pytest.raises(PeerError, match="is invalid"):
        answered(founder)

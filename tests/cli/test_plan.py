"""The output of ``sollold plan``."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sollold.cli import plan
from sollold.client.errors import ClientError

SHARE = {"device": "CPU", "first": 0, "last": 3, "weights": 1, "state": 1, "compute": 1, "overhead": 1}


class Daemon:
    """A double that plans a model over an online and an offline node."""

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        shares = [SHARE | {"node": "aa"}, SHARE | {"node": "bb"}]
        host = SHARE | {"node": "aa", "first": 0, "last": 0}
        made: dict[str, Any] = {"head": "aa", "host": host, "shares": shares}
        made |= {"layers": 6, "tokens_per_second": 1.0, "load_seconds": 0.004, "reasons": []}
        return {"ok": True, "plan": made, "reason": "it waits for bert", "context": 768, "free": []} | {
            kind: 1 for kind, _, _ in plan.KINDS
        }

    def get(self, path: str) -> dict[str, Any]:
        return {"nodes": [{"node": "aa", "name": "anna"}], "offline": [{"node": "bb", "name": "bert"}]}


def test_an_offline_machine_is_shown_with_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "client", lambda options: Daemon())
    monkeypatch.setattr(plan, "wishes", lambda options: {})
    plan.plan(argparse.Namespace(json=False, online=False, model="big"))
    output = capsys.readouterr().out
    assert "anna" in output and "bert " in output and "bb" not in output
    assert "loads in about 1.0 s" in output, "no process starts within milliseconds"


@pytest.mark.parametrize(
    ("message", "hinted"), [("model 'big' not found", True), ("model 'draft' not found", False)]
)
def test_reading_the_header_online_is_advised_for_the_named_model_only(
    monkeypatch: pytest.MonkeyPatch, message: str, hinted: bool
) -> None:
    class Refusing(Daemon):
        def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            raise ClientError(message, 404)

    monkeypatch.setattr(plan, "client", lambda options: Refusing())
    monkeypatch.setattr(plan, "wishes", lambda options: {})
    with pytest.raises(ClientError) as refused:
        plan.plan(argparse.Namespace(json=False, online=False, model="big"))
    assert ("sollold plan --online big" in refused.value.message) == hinted


def test_memory_in_parts_that_are_too_small_is_not_shown_as_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short(Daemon):
        def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
            missing = {"needed": 1 << 30, "there": 2 << 30, "missing": 0, "remedies": []}
            return {"ok": False, "reason": "big does not fit.", "missing": missing}

    monkeypatch.setattr(plan, "client", lambda options: Short())
    monkeypatch.setattr(plan, "wishes", lambda options: {})
    plan.plan(argparse.Namespace(json=False, online=False, model="big"))
    output = capsys.readouterr().out
    assert "needed" in output and "2.00 GiB" in output and "missing" not in output

"""The table of clients and features has no hole: its cells are tests, and each client's test is a cell."""

from __future__ import annotations

import inspect

import pytest

from tests.api import test_clients, test_clients_further, test_clients_images
from tests.api.client_table import COLUMNS, TABLE, cell, shown
from tests.api.conftest import WAYS

MODULES = (test_clients, test_clients_further, test_clients_images)
TESTS = {
    name: member
    for module in MODULES
    for name, member in inspect.getmembers(module, inspect.isfunction)
    if name.startswith(tuple(COLUMNS.values()))
}
CELLS = {cell(feature, client) for feature in TABLE for client in TABLE[feature]}


def test_every_cell_is_a_test_that_runs_on_every_way() -> None:
    assert not CELLS - TESTS.keys(), "cells without a test"
    assert not [name for name in CELLS if "url" not in inspect.signature(TESTS[name]).parameters]
    assert {"far", "at_ollama"} <= set(WAYS.values())


def test_every_test_of_a_client_is_a_cell() -> None:
    assert not TESTS.keys() - CELLS, "tests that the table lacks"


def test_a_cell_that_failed_or_was_not_run_is_seen() -> None:
    (line,) = [line for line in shown({"test_ollama_chat": ["passed", "failed"]}) if line.startswith("chat ")]
    assert "1 of 2 NOT" in line and "NOT RUN" in line
    assert "2 passed" in "\n".join(shown({"test_ollama_chat": ["passed", "passed"]}))


@pytest.mark.parametrize("client", COLUMNS)
def test_no_client_lacks_what_all_dialects_have(client: str) -> None:
    for feature in ("chat", "tools", "thinking", "schema", "images"):
        assert cell(feature, client)

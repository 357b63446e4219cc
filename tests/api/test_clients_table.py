"""The table of clients and features is complete: each cell is a test, and each client's test is in a cell."""

from __future__ import annotations

import inspect

import pytest

from tests.api import test_clients, test_clients_further, test_clients_images
from tests.api.client_table import COLUMNS, TABLE, cell, table_lines
from tests.api.conftest import WAYS

MODULES = (test_clients, test_clients_further, test_clients_images)
TESTS = {
    name: member
    for module in MODULES
    for name, member in inspect.getmembers(module, inspect.isfunction)
    if name.startswith(tuple(COLUMNS.values()))
}
CELLS = {cell(feature, client) for feature in TABLE for client in TABLE[feature]}


def test_every_cell_is_a_test_that_runs_for_all_ways() -> None:
    assert not CELLS - TESTS.keys(), "cells without a test"
    assert not [name for name in CELLS if "url" not in inspect.signature(TESTS[name]).parameters]
    assert {"far", "at_ollama"} <= set(WAYS.values())


def test_every_test_of_a_client_is_in_the_table() -> None:
    assert not TESTS.keys() - CELLS, "tests missing from the table"


def test_failed_and_missing_runs_are_shown() -> None:
    (line,) = [
        line for line in table_lines({"test_ollama_chat": ["passed", "failed"]}) if line.startswith("chat ")
    ]
    assert "1 of 2 NOT" in line and "NOT RUN" in line
    assert "2 passed" in "\n".join(table_lines({"test_ollama_chat": ["passed", "passed"]}))


@pytest.mark.parametrize("client", COLUMNS)
def test_common_features_are_tested_for_every_client(client: str) -> None:
    for feature in ("chat", "tools", "thinking", "schema", "images"):
        assert cell(feature, client)

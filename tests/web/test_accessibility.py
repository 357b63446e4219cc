"""Check every view of the dashboard with axe, which Lighthouse's accessibility score is based on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sollold.cluster.gossip.record import WaitingMachine
from tests.npm import fetched
from tests.web.browser import Page
from tests.web.conftest import Show
from tests.web.scene import cluster_of, library_of, machine, machines
from tests.web.test_dashboard import READY, VIEWS

pytestmark = [pytest.mark.clients, pytest.mark.timeout(240)]

FOUND = """axe.run(document, { resultTypes: ["violations"], runOnly: %s }).then((result) =>
  result.violations.flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 120)}`)))"""
ALL = FOUND % '["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]'
DARK = FOUND % '["color-contrast"]'


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the axe script, which runs in the page."""
    folder = fetched(Path(__file__).with_name("npm"), tmp_path_factory.mktemp("npm"), "accessibility is")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text()


async def test_axe_finds_no_violations(page: Page, show: Show, axe: str) -> None:
    first, second, third, *others = machines()
    waiting = (WaitingMachine("f" * 16, "gina", "4711-0815"),)
    lost = replace(others[-1], node="f" * 16, name="fritz")
    records = (replace(first, waiting=waiting), second, replace(third, draining=True), *others)
    given, url = await show(*records, lost)
    cluster_of(given).change(*records)
    found = {}
    for view in VIEWS:
        await page.size(390, 844)
        await page.open(f"{url}/#/{view}")
        await page.until(READY)
        if view == "models":
            await page.click("[data-model='llama3.3:70b'] [data-act=Plan]")
            await page.until("document.querySelector('.plan')")
        elif view == "chat":
            await page.until("document.querySelector('#chat-model').value")
            await page.write("#message", "What is this?")
            await page.press("Enter")
            await page.until("document.querySelector('.assistant .foot button')")
        elif view == "requests":
            await page.until("document.querySelectorAll('tbody tr').length > 5")
        await page.run(f"{axe};0")
        found[view] = await page.run(ALL)
        await page.size(1180, 844, dark=True)
        found[view] += await page.run(DARK)
    assert {view: rules for view, rules in found.items() if rules} == {}


async def test_a_single_machine_without_models_shows_hints(page: Page, show: Show, axe: str) -> None:
    given, url = await show(machine("anna"))
    library_of(given).all.clear()
    hints = {
        "cluster": ("Only this machine so far", "There is no model yet"),
        "models": ("No model yet. Pull one above",),
        "chat": ("There is no model to chat with yet",),
    }
    for view, words in hints.items():
        await page.open(f"{url}/#/{view}")
        for hint in words:
            await page.until(f"document.querySelector('main').innerText.includes('{hint}')")
        await page.run(f"{axe};0")
        assert await page.run(ALL) == [], view

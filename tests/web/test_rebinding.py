"""DNS rebinding in a real Chromium: the name of a loaded page is changed to a node's address.

The browser regards page and node as one origin, so it sends the page's requests and lets it read the answers.
Only the node can refuse them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web

from sollold.api.http.application import Listener, build_app
from sollold.settings.schema import HttpSettings
from tests.doubles import free_port
from tests.web.browser import PROGRAM, Browser, Page, chromium
from tests.web.scene import NODES, cluster_of, services

pytestmark = pytest.mark.browser

EVIL = "evil.example"
ASKED = f"""(async (base) => {{
  const json = {{'Content-Type': 'application/json'}}, seen = [];
  const drain = JSON.stringify({{node: '{NODES["emil"]}'}});
  for (const [path, options] of [
    ['/api/tags', {{}}],
    ['/api/cluster', {{}}],
    ['/', {{}}],
    ['/metrics', {{}}],
    ['/api/cluster/drain', {{method: 'POST', headers: json, body: drain}}],
    ['/api/cluster/drain', {{method: 'POST', body: drain}}],
    ['/api/cluster/drain', {{method: 'POST', body: drain, mode: 'no-cors'}}],
    ['/api/cluster/keys', {{method: 'POST', headers: json, body: '{{"name": "mine", "scope": "admin"}}'}}],
    ['/api/delete', {{method: 'DELETE', headers: json, body: '{{"model": "llama3.3:70b"}}'}}],
    ['/api/chat', {{method: 'POST', body: '{{"model": "llama3.3:70b", "messages": []}}'}}],
  ]) {{
    try {{
      const answer = await fetch(base + path, options);
      seen.push([answer.status, (await answer.text()).slice(0, 4000)]);
    }} catch (error) {{
      seen.push([0, String(error)]);
    }}
  }}
  navigator.sendBeacon(base + '/api/cluster/drain', drain);
  return seen;
}})"""


@pytest.fixture
async def tab(tmp_path: Path) -> AsyncIterator[Page]:
    """Yield a tab that resolves the name to this machine."""
    if PROGRAM is None:
        pytest.skip("no Chromium here (package chromium)")
    with chromium(tmp_path / "profile", f"--host-resolver-rules=MAP {EVIL} 127.0.0.1") as address:
        async with ClientSession() as session, Browser(address, session).page() as page:
            yield page


async def attackers_page(port: int) -> web.AppRunner:
    """Serve the attacker's page on ``port``."""

    async def show(request: web.Request) -> web.Response:
        headers = {"Content-Type": "text/html", "Connection": "close"}
        return web.Response(body=b"<title>You have won</title>", headers=headers)

    app = web.Application()
    app.router.add_get("/", show)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    return runner


async def serve(stack: AsyncExitStack, port: int, **settings: Any) -> Any:
    """Start a node on ``port`` and return its services."""
    given = await stack.enter_async_context(services())
    facts = HttpSettings(host="127.0.0.1", port=port, **settings)
    listener = Listener(build_app(given, facts), facts, drain=0.2)
    await listener.start()
    stack.push_async_callback(listener.close)
    return given


@pytest.mark.parametrize("allowed", [False, True], ids=["refused", "had it been admitted"])
async def test_a_page_rebound_to_the_node(tab: Page, allowed: bool) -> None:
    port = free_port()
    page = await attackers_page(port)
    await tab.open(f"http://{EVIL}:{port}/")
    assert await tab.run("document.title") == "You have won"
    await page.cleanup()
    async with AsyncExitStack() as stack:
        given = await serve(stack, port, hosts=(EVIL,) if allowed else ())
        seen = await tab.run(f"{ASKED}('')")
        orders = cluster_of(given).asked
        if allowed:
            assert [status for status, _ in seen][:5] == [200] * 5 and "llama3.3" in seen[0][1]
            assert ("drain", NODES["emil"], True) in orders
            return
        assert {status for status, _ in seen} == {403}
        assert all("is not allowed" in text and "llama3.3" not in text for _, text in seen)
        assert not orders


async def test_a_page_on_another_port_of_the_same_name(tab: Page) -> None:
    port, node_port = free_port(), free_port()
    page = await attackers_page(port)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(page.cleanup)
        given = await serve(stack, node_port)
        await tab.open(f"http://{EVIL}:{port}/")
        for name in (EVIL, "127.0.0.1", "localhost"):
            seen = await tab.run(f"{ASKED}('http://{name}:{node_port}')")
            assert {status for status, _ in seen} == {0}, name
        assert not cluster_of(given).asked

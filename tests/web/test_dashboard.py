"""The dashboard in a real Chromium: all actions, failing machines, twenty machines, hostile names."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from sollold.cluster.gossip.record import Placed, State, WaitingMachine
from sollold.control.cluster import Planned
from sollold.control.events import Event, EventKind
from sollold.control.history import HistoryRequest, NodeHistory
from sollold.control.keys import Scope
from sollold.engines.install.find import Llama
from sollold.errors import Fault, Refusal
from sollold.leader.messages import Dropped
from sollold.models.gguf import demo_model
from sollold.settings.schema import GIB
from tests.api.api_parts import REMOTE, TRUSTED_PROXIES
from tests.daemons import Cluster
from tests.doubles import until
from tests.web.browser import Browser, Page
from tests.web.conftest import Show
from tests.web.scene import (
    GEMMA,
    LLAMA,
    NODES,
    QWEN,
    Pulls,
    TalkingService,
    cluster_of,
    library_of,
    machine,
    machines,
)

pytestmark = pytest.mark.browser

VIEWS = (
    "cluster",
    "models",
    "model/llama3.3%3A70b",
    "chat",
    "requests",
    "history",
    "connect",
    "keys",
    "doctor",
)
READY = (
    "document.querySelector('main h1') && document.querySelector('#headline').textContent.includes('leader')"
)
CARDS = "[...document.querySelectorAll('.machine h3')].map((h) => h.textContent)"


async def drop_network_errors(page: Page) -> None:
    """Leave the page and drop the console errors about unreachable nodes."""
    await page.call("Page.navigate", url="about:blank")
    await page.until("location.href === 'about:blank'")
    page.console[:] = [line for line in page.console if "net::ERR_" not in line]


async def test_the_cluster_view_shows_machines_and_models(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(url)
    await page.until("document.querySelectorAll('.machine').length === 5")
    assert await page.run(CARDS) == ["anna", "bert", "cleo", "dora", "emil"]
    band = await page.run(f"document.querySelector('[data-node=\\'{NODES['bert']}\\'] .band').title")
    assert band == "llama3.3:70b, layers 36–63: 15.8 GiB"
    # One line for each hop of a model between machines, with its measured values.
    await page.until("document.querySelectorAll('.links path[d]').length === 3")
    trips = await page.run("[...document.querySelectorAll('.links text')].map((t) => t.textContent)")
    assert trips == ["0.42 ms", "113 MiB/s", "0.61 ms", "105 MiB/s", "0.48 ms", "114 MiB/s"]
    assert "loading 43 %" in await page.run("document.querySelector('.running').innerText")
    assert await page.run("document.querySelector('#headline').textContent") == (
        "5 nodes · leader anna · seen from anna"
    )
    assert "unloads after 5 min without" in await page.run("document.querySelector('.run').innerText")
    idle = replace(LLAMA, active=0, waiting=0, expires=90.0)
    cluster_of(given).change(replace(machines()[0], endpoints=(idle,)), *machines()[1:])
    await page.until("document.querySelector('.run').innerText.includes('unloads in 1 min 30 s without')")


async def test_failures_and_drains_appear_within_two_seconds(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(url)
    await page.until("document.querySelectorAll('.machine').length === 5")
    # The event stream is open once the doctor has been queried.
    await page.until("performance.getEntriesByType('resource').some((e) => e.name.includes('/doctor'))")
    await page.run("window.mark = document.querySelector('.machine'); mark.querySelector('button').focus()")
    began = time.monotonic()
    cluster_of(given).change(*machines()[:1], replace(machines()[1], draining=True), *machines()[3:])
    await page.until("document.querySelector('.machine.is-offline h3')?.textContent === 'cleo'", 4)
    await page.until("document.querySelector('.machine.is-draining h3')?.textContent === 'bert'", 4)
    assert time.monotonic() - began < 2.5
    assert "it held 9.40 GiB of llama3.3:70b" in await page.run(
        "document.querySelector('.is-offline').innerText"
    )
    await page.until("document.querySelector('.events').innerText.includes('cleo stopped responding')")
    # The model that had layers there still lists it, without a line to it.
    assert "cleo 64–79" in await page.run("document.querySelector('.run').innerText")
    assert await page.run("document.querySelectorAll('.links path[d]').length") == 2
    # The elements are updated in place and keep the focus.
    assert await page.run("mark.isConnected && mark.contains(document.activeElement)")
    await page.click(".is-offline button")
    await page.until("!document.querySelector('.is-offline')")


async def test_a_failed_model_shows_its_reason_and_what_to_do(page: Page, show: Show) -> None:
    reason = "llama-server: CUDA error: out of memory"
    failed = replace(GEMMA, state=State.FAILED, reason=reason)
    dora = replace(machines()[3], endpoints=(failed, replace(QWEN, state=State.LOADING), GEMMA))
    given, url = await show(*machines()[:3], dora, machines()[4])
    await page.open(url)
    await page.until("document.querySelectorAll('.run').length === 3")
    assert "2 loading, 1 failed" in await page.run("document.querySelector('.figures').innerText")
    text = await page.run("document.querySelectorAll('.run')[1].innerText")
    assert reason in text and "failed on dora" in text and "answers on" not in text
    assert "will answer on dora" in await page.run("document.querySelectorAll('.run')[2].innerText")
    cluster_of(given).change(*machines()[:3], replace(machines()[3], endpoints=(failed,)), machines()[4])
    # The memory of a failed model is not its own any more, and nothing passes between its machines.
    await page.until("document.querySelectorAll('.run').length === 2")
    assert not await page.run(f"document.querySelector('[data-node=\\'{NODES['emil']}\\'] .band')")
    assert await page.run("document.querySelectorAll('.links path[d]').length") == 2
    await page.click(".run:last-child .again a")
    await page.until("document.querySelector('.panel .reason.bad-text')?.innerText.includes('out of memory')")
    await page.until("!document.querySelector('.title-row .primary').hidden")
    await page.click("#nav a[href='#/models']")
    await page.until(
        f"document.querySelector('[data-model=\\'{failed.model}\\'] .reason').innerText === '{reason}'"
    )


async def test_times_are_those_of_the_commands_in_every_language(page: Page, show: Show) -> None:
    given, url = await show()
    await page.call("Emulation.setLocaleOverride", locale="ar-EG")
    await page.call("Emulation.setTimezoneOverride", timezoneId="Asia/Kolkata")
    # Midnight there.
    given.monitor.events.add(1_800_037_800.0, EventKind.NODE_LOST, "cleo stopped responding")
    await page.open(url)
    await page.until("document.querySelector('.events').innerText.includes('cleo')")
    assert "2027-01-16 00:00:00" in await page.run("document.querySelector('.events').innerText")


async def test_the_models_of_a_large_library_are_filtered(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/models")
    await page.until("document.querySelectorAll('.model').length === 5")
    assert await page.run("document.querySelector('[type=search]').hidden")
    listed = next(iter(library_of(given).all.values()))
    for number in range(20):
        name = f"copy-{number}:latest"
        library_of(given).all[name] = replace(listed, model=replace(listed.model, name=name))
    await page.open(f"{url}/#/models")
    await page.until("document.querySelectorAll('.model').length === 25")
    await page.write("[type=search]", "Copy-1")
    await page.until("document.querySelectorAll('.model').length === 11")
    await page.write("[type=search]", "nothing")
    await page.until("document.querySelector('main').innerText.includes('No model has this')")


async def test_the_history_of_many_machines_is_summed(page: Page, show: Show) -> None:
    given, url = await show()
    devices = {f"CUDA{number}": {"used_bytes": [2.0 * GIB, 2.0 * GIB]} for number in range(9)}
    node = NodeHistory("a" * 16, "anna", {}, devices)

    async def histories(request: HistoryRequest) -> list[NodeHistory]:
        return [node]

    given.monitor.histories = histories  # type: ignore[method-assign]
    await page.open(f"{url}/#/history")
    await page.until("document.querySelector('main').innerText.includes('Memory in use, sum of 9')")
    assert "now 18.0 GiB" in await page.run("document.querySelector('main').innerText")


async def test_drain_and_unload_from_the_cluster_view(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(url)
    await page.click(f"[data-node='{NODES['emil']}'] button")
    await until(lambda: ("drain", NODES["emil"], True) in cluster_of(given).asked)
    await page.click(".run button")
    await until(lambda: ("unload", "llama-70b-1", False) in cluster_of(given).asked)


@pytest.mark.llama
@pytest.mark.cluster
async def test_the_page_keeps_its_contents_when_its_node_dies(
    page: Page, tmp_path: Path, llama: Llama
) -> None:
    with Cluster(2, tmp_path, llama, loopback=True) as nodes:
        await asyncio.to_thread(nodes.together)
        await page.open(nodes[0].url)
        await page.until("document.querySelector('.events').innerText.includes('is the leader')")
        await asyncio.to_thread(nodes[0].kill)
        await page.until("document.querySelector('#trouble').innerText.includes('does not answer')")
        assert "shows its state at" in await page.run("document.querySelector('#trouble').innerText")
        assert "is the leader" in await page.run("document.querySelector('.events').innerText")
        # The page links to another node.
        await page.click("#trouble a")
        await page.until(f"location.href === '{nodes[1].url}/' && document.querySelector('.machine')")
        await drop_network_errors(page)


async def test_every_view_handles_the_absence_of_models(page: Page, show: Show) -> None:
    given, url = await show()
    library_of(given).all.clear()
    cluster_of(given).change(replace(machines()[1], links=()))
    await page.open(f"{url}/#/model/nosuch")
    await page.until("document.querySelector('main .empty').innerText.includes('has this model')")
    await page.until("[...document.querySelectorAll('main button')].every((b) => !b.offsetParent)")
    await page.open(f"{url}/#/connect")
    await page.until("document.querySelector('main .empty').innerText.includes('no model yet')")
    assert not await page.run("document.querySelector('#connect-model').offsetParent")
    await page.open(f"{url}/#/chat")
    await page.until("document.querySelector('main .empty').innerText.includes('no model to chat with')")
    await page.until("[...document.querySelectorAll('main button')].every((b) => !b.offsetParent)")


async def test_a_missing_leader_is_shown_and_explains_failed_commands(page: Page, show: Show) -> None:
    given, url = await show()
    cluster = cluster_of(given)
    cluster.leads = False
    cluster.refusal = Refusal(Fault.UNAVAILABLE, "the cluster has no leader right now; try again")
    await page.open(url)
    notice = await page.until("!leaderless.hidden && leaderless.innerText")
    assert notice.startswith("The cluster has no leader: the machines are electing one")
    assert "no leader" in await page.run("document.querySelector('#headline').textContent")
    failure = (
        "document.querySelector('#failed').hidden ? '' : document.querySelector('#failed span').textContent"
    )
    why = "the cluster has no leader right now; try again"
    await page.click(".run button")
    await page.until(f"({failure}) === 'Unload llama3.3:70b: {why}'")
    # The message stays while the node answers other requests.
    asked = "performance.getEntriesByType('resource').filter((e) => e.name.endsWith('/api/cluster')).length"
    before = await page.run(asked)
    await page.until(f"{asked} > {before + 1}")
    assert await page.run(failure)
    await page.click("#failed button")
    assert not await page.run(failure)
    await page.click(f"[data-node='{NODES['emil']}'] button")
    await page.until(f"({failure}).startsWith('Drain emil') && ({failure}).endsWith('{why}')")
    for view, button in (
        ("models", "[data-model='demo:latest'] [data-act=Load]"),
        ("model/demo", ".primary"),
    ):
        await page.open(f"{url}/#/{view}")
        await page.click(button)
        await page.until(f"document.querySelector('main [role=alert]')?.innerText === '{why}'")
    cluster.leads, cluster.refusal = True, None
    await page.until("leaderless.hidden", 4)


async def test_repeated_clicks_send_a_command_once(page: Page, show: Show) -> None:
    given, url = await show()
    cluster = cluster_of(given)
    goes_on = asyncio.Event()

    async def unload(model: str, *, force: bool) -> Dropped:
        cluster.asked.append(("unload", model, force))
        await goes_on.wait()
        return Dropped(ended=("d1",))

    cluster.unload = unload  # type: ignore[method-assign]
    await page.open(url)
    await page.click(".run button")
    await page.until("document.querySelector('.run button').ariaBusy === 'true'")
    await page.click(".run button")
    goes_on.set()
    await page.until("document.querySelector('.run button').ariaBusy === 'false'")
    assert [request for request in cluster.asked if request[0] == "unload"] == [
        ("unload", "llama-70b-1", False)
    ]


@pytest.mark.llama
@pytest.mark.cluster
async def test_the_loss_of_a_majority_is_shown(page: Page, tmp_path: Path, llama: Llama) -> None:
    with Cluster(3, tmp_path, llama, loopback=True, start=False) as nodes:
        for node in nodes:
            demo_model.write(node.models / "demo.gguf")
            node.start()
        await asyncio.to_thread(nodes.together)
        state = nodes[0].state()
        last = next(node for node in nodes if node.name != state["leader_name"])
        await page.open(last.url)
        await page.until("document.querySelectorAll('.machine').length === 3")
        for node in nodes:
            if node is not last:
                await asyncio.to_thread(node.kill)
        await page.until("document.querySelectorAll('.machine.is-offline').length === 2", 20)
        await page.until(
            f"headline.textContent === '1 node, 2 offline · leader {last.name} · seen from {last.name}'", 20
        )
        # The rest of the cluster accepts commands.
        await page.open(f"{last.url}/#/models")
        await page.click("[data-act=Load]")
        await page.until("document.querySelector('.model .tags').innerText.includes('ready')", 60)
        await drop_network_errors(page)


@pytest.mark.parametrize("width", [390, 1180])
async def test_twenty_machines_and_hostile_names_fit(page: Page, show: Show, width: int) -> None:
    evil = "<img src=x onerror=alert(1)>" + "x" * 300
    long = "node-" + "very-long-name-" * 12
    placed = tuple(Placed(f"{number:016x}", "CPU", number * 4, number * 4 + 4, 2**30) for number in range(20))
    spread = replace(LLAMA, model=evil, placed=placed, reason="<script>alert(1)</script> " + "y" * 200)
    records = [
        machine(
            "anna",
            *machines()[0].devices,
            node=f"{number:016x}",
            endpoints=(spread,) if number == 0 else (),
        )
        for number in range(20)
    ]
    records = [
        replace(node, name=(evil, long, *(f"node{index:02}" for index in range(18)))[index])
        for index, node in enumerate(records)
    ]
    _, url = await show(*records)
    await page.size(width, 844)
    for view in VIEWS:
        await page.open(f"{url}/#/{view}")
        await page.until(READY)
        if view == "cluster":
            await page.until("document.querySelectorAll('.machine').length === 20")
            assert evil in await page.run(CARDS) and long in await page.run(CARDS)
        assert await page.overflow() == 0, view
    assert await page.run("document.querySelectorAll('main img, main script').length") == 0


async def test_a_right_to_left_name_does_not_reorder_the_numbers_after_it(page: Page, show: Show) -> None:
    _, url = await show(replace(machines()[0], name="מכונה"), *machines()[1:])
    await page.size(1180, 844)
    await page.open(f"{url}/#/cluster")
    # The positions of the first and the last layer number.
    numbers = """[...document.querySelectorAll('.run .band')].filter((one) => one.innerText.includes('מכונה'))
      .map((one) => ['0', '5'].map((digit) => {
        const text = one.firstChild, range = document.createRange();
        const at = text.data.lastIndexOf(digit);
        range.setStart(text, at); range.setEnd(text, at + 1);
        return range.getBoundingClientRect().left;
      }))"""
    await page.until(f"({numbers}).length")
    ((first, last),) = await page.run(numbers)
    assert first < last


async def test_no_view_is_wider_than_a_phone(page: Page, show: Show) -> None:
    _, url = await show()
    await page.size(390, 844)
    for view in VIEWS:
        await page.open(f"{url}/#/{view}")
        await page.until(READY)
        if view == "models":
            await page.click("[data-model='llama3.3:70b'] [data-act=Plan]")
            await page.until("document.querySelector('.plan')")
        assert await page.overflow() == 0, view


async def test_models_are_planned_loaded_unloaded_copied_and_deleted(page: Page, show: Show) -> None:
    given, url = await show()
    cluster, library = cluster_of(given), library_of(given)
    await page.open(f"{url}/#/models")
    await page.until("document.querySelectorAll('.model').length === 5")
    row = "[data-model='demo:latest']"
    await page.click(f"{row} [data-act=Plan]")
    text = await page.until(f'document.querySelector("{row} .plan")?.innerText')
    assert "about 14.6 tokens/s" in text and "41.8 GiB weights" in text and "layers 64–79 + output" in text
    await page.click(f"{row} .plan .close")
    await page.click(f"{row} [data-act=Load]")
    await until(lambda: any(getattr(order, "model", "") == "demo:latest" for order in cluster.asked[1:]))
    await page.click("[data-model='llama3.3:70b'] [data-act=Unload]")
    await until(lambda: ("unload", "llama3.3:70b", False) in cluster.asked)
    await page.click(f"{row} [data-act=Copy]")
    await page.write(f"{row} .model-panel input", "mydemo")
    await page.press("Enter")
    await until(lambda: ("demo:latest", "mydemo", ()) in library.copied)
    await page.click(f"{row} [data-act=Delete]")
    await page.click(f"{row} .danger")
    await until(lambda: ("demo:latest", ()) in library.deleted)


async def test_a_model_that_does_not_fit_shows_remedies(page: Page, show: Show) -> None:
    given, url = await show()
    missing = {"needed": 2**35, "there": 2**34, "missing": 2**34, "weights": 2**34, "state": 2**33,
               "buffers": 2**30, "remedies": ["a smaller context: 4096"]}  # fmt: skip
    reason = "It does not fit. What would help: a smaller context: 4096. beta is left out."
    cluster_of(given).planned = Planned(False, reason, {"plan": None, "missing": missing})
    await page.open(f"{url}/#/models")
    await page.click("[data-model='demo:latest'] [data-act=Plan]")
    text = await page.until("document.querySelector('.plan')?.innerText")
    assert "16.0 GiB missing" in text and text.count("a smaller context: 4096") == 1
    assert "It does not fit. beta is left out." in text


async def test_a_model_is_pulled_with_progress(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/models")
    await page.write("#pull-name", "llama3.2:3b")
    await page.press("Enter")
    await page.until("document.querySelector('.pulls').innerText.includes('1.00 GiB of 4.00 GiB')")
    assert await page.run("document.querySelector('.pulls progress').value") == 0.25
    assert isinstance(given.puller, Pulls)
    given.puller.goes_on.set()
    await page.until("document.querySelector('.pulls').innerText.includes('done')")


async def test_a_models_page_shows_its_placement_and_the_reasons(page: Page, show: Show) -> None:
    _, url = await show()
    await page.open(f"{url}/#/model/llama3.3%3A70b")
    await page.until("document.querySelector('.plan')")
    text = await page.run("document.querySelector('main').innerText")
    for words in ("16384 tokens of context", "2 requests at a time", "64–79 + output (16)", "14.2 tokens/s",
                  "anna and bert read their memory fastest", "error: the engine ran out"):  # fmt: skip
        assert words in text, words


async def test_chat_question_answer_and_regeneration(page: Page, show: Show) -> None:
    service = TalkingService()
    _, url = await show(service=service)
    await page.open(f"{url}/#/chat/llama3.3%3A70b")
    await page.until("document.querySelector('#chat-model').value === 'llama3.3:70b'")
    await page.run("document.querySelector('.settings').open = true")
    await page.write("#chat-temperature", "0.2")
    await page.write("#chat-system", "Be brief.")
    await page.write("#message", "Hello")
    await page.press("Enter", composing=True)
    assert not service.asks, "Enter that ends an IME composition sends nothing"
    await page.press("Enter")
    await page.until("document.querySelector('.assistant .foot button')")
    body = next(iter(service.asks[-1].calls.values())).body
    assert body["options"] == {"temperature": 0.2}
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    turns = "document.querySelector('.said')"
    assert await page.run(f"{turns}.querySelector('pre code').textContent.startsWith('def greet')")
    assert await page.run(f"{turns}.querySelectorAll('li').length") == 2
    assert await page.run(f"{turns}.querySelector('table').rows.length") == 3
    assert await page.run(f"{turns}.querySelectorAll('b, script, img, a').length") == 0
    assert "<b>HTML stays text</b>" in await page.run(f"{turns}.innerText")
    assert await page.run("document.querySelector('.thinking').open") is False
    foot = await page.run("document.querySelector('.foot').innerText")
    assert "96 tokens" in foot and "tokens/s" in foot and "alpha/CPU" in foot
    await page.run("[...document.querySelectorAll('.foot button')].at(-1).click()")
    await until(lambda: len(service.asks) == 2)
    await page.until("document.querySelectorAll('.assistant .foot button').length")
    assert await page.run("document.querySelectorAll('.bubble').length") == 2
    kept = json.loads(await page.run("localStorage.getItem('sollold.chats')"))
    assert [message["role"] for message in kept[0]["messages"]] == ["user", "assistant"]
    await page.open(f"{url}/#/chat")
    await page.until("document.querySelectorAll('.bubble').length === 2")
    await page.run("[...document.querySelectorAll('.title-row button')].at(-1).click()")
    assert await page.run("JSON.parse(localStorage.getItem('sollold.chats')).length") == 0


async def open_and_ask(page: Page, url: str, text: str) -> None:
    """Open the chat and ask the preselected model in the most recent conversation."""
    await page.open(f"{url}/#/chat")
    await page.until("document.querySelector('#chat-model').value")
    await page.write("#message", text)
    await page.press("Enter")


async def test_stop_keeps_the_partial_answer_and_the_conversation_continues(page: Page, show: Show) -> None:
    service = TalkingService()
    _, url = await show(service=service)
    await open_and_ask(page, url, "wait for ever")
    await page.until("document.querySelector('.said')?.innerText.includes('answer that')")
    await page.run(
        "[...document.querySelectorAll('.composer button')].find((b) => b.textContent === 'Stop').click()"
    )
    await page.until("document.querySelector('.foot')?.innerText.includes('stopped')")
    await until(lambda: service.closed == 1)
    await page.write("#message", "And now?")
    await page.press("Enter")
    await page.until("document.querySelectorAll('.assistant .foot').length === 2")
    body = next(iter(service.asks[-1].calls.values())).body
    assert [message["content"].strip() for message in body["messages"]] == [
        "wait for ever",
        "An answer that",
        "And now?",
    ]


async def test_a_refusal_in_the_chat_is_shown(page: Page, show: Show) -> None:
    _, url = await show()
    await open_and_ask(page, url, "refuse this")
    await page.until("document.querySelector('.talk').innerText.includes('3 GiB are missing')")


async def test_a_chat_with_a_missing_model_is_explained(page: Page, show: Show) -> None:
    _, url = await show()
    gone = (
        "[...document.querySelectorAll('.notice')].find((p) => p.innerText.includes('has gone:1b; another'))"
    )
    await page.open(f"{url}/#/chat/gone%3A1b")
    await page.until(gone)
    await page.open(f"{url}/#/chat/demo")
    await page.until("document.querySelector('#chat-model').value")
    assert await page.run("document.querySelector('#chat-model').value") == "demo:latest"
    assert not await page.run(f"Boolean({gone})")


async def test_a_failed_question_can_be_repeated(page: Page, show: Show) -> None:
    service = TalkingService()
    _, url = await show(service=service)
    await open_and_ask(page, url, "refuse this")
    await page.click("button.again")
    await until(lambda: len(service.asks) == 2)
    await page.until("document.querySelector('button.again')")
    assert await page.run("document.querySelectorAll('.bubble.user').length") == 1
    await page.open(f"{url}/#/chat")
    await page.until("document.querySelector('#chat-model').value")
    await page.click("button.again")
    await until(lambda: len(service.asks) == 3)
    body = next(iter(service.asks[-1].calls.values())).body
    assert [message["content"] for message in body["messages"]] == ["refuse this"]


async def test_chat_buttons_are_enabled_with_a_model_and_without_a_running_answer(
    page: Page, show: Show
) -> None:
    given, url = await show(service=TalkingService())
    send = "document.querySelector('.composer [type=submit]').disabled"
    await open_and_ask(page, url, "refuse this")
    await page.until("document.querySelector('button.again')")
    models = dict(library_of(given).all)
    library_of(given).all.clear()
    await page.open(f"{url}/?again#/chat")
    await page.until("document.querySelector('button.again')")
    assert await page.run(f"document.querySelector('button.again').disabled && {send}")
    library_of(given).all.update(models)
    await page.open(f"{url}/?and-again#/chat")
    await page.until(f"document.querySelector('#chat-model').value && !{send}")
    assert not await page.run("document.querySelector('button.again').disabled")
    await page.write("#message", "wait for ever")
    await page.press("Enter")
    await page.until("document.querySelector('.said')?.innerText.includes('answer that')")
    # The list of models changes meanwhile.
    await page.run("document.querySelector('#chat-model').dispatchEvent(new Event('change')); 0")
    assert await page.run(send)


async def test_a_partial_answer_survives_a_reload(page: Page, show: Show) -> None:
    service = TalkingService()
    _, url = await show(service=service)
    await open_and_ask(page, url, "wait for ever")
    await page.until("document.querySelector('.said')?.innerText.includes('answer that')")
    await page.call("Page.reload")
    await page.until(
        "performance.getEntriesByType('navigation')[0].type === 'reload' && "
        "document.querySelector('.assistant').innerText.includes('An answer that') && "
        "document.querySelector('.assistant .foot').innerText.includes('stopped')"
    )
    await until(lambda: service.closed == 1)


async def test_two_tabs_keep_all_conversations(devtools: str, page: Page, show: Show) -> None:
    _, url = await show()

    async def ask(tab: Page, words: str, answers: int) -> None:
        await tab.write("#message", words)
        await tab.press("Enter")
        await tab.until(
            f"document.querySelectorAll('.assistant .foot button:not(.again)').length == {answers}"
        )

    async def keeps(chats: list[list[str]]) -> None:
        """Wait until the other tab's process sees what one tab stored."""
        stored = "JSON.parse(localStorage.getItem('sollold.chats'))"
        asked = "chat.messages.filter((one) => one.role === 'user').map((one) => one.content)"
        found = f"JSON.stringify({stored}.map((chat) => {asked}).sort())"
        await page.until(f"{found} === JSON.stringify({json.dumps(chats)})")

    async with ClientSession() as session, Browser(devtools, session).page() as other:
        for tab in (page, other):
            await tab.open(f"{url}/#/chat/llama3.3%3A70b")
            await tab.until("document.querySelector('#chat-model').value")
        await ask(page, "one", 1)
        await ask(other, "two", 1)
        await keeps([["one"], ["two"]])
        # Both tabs continue the same conversation from each other's messages.
        first_option = "[...document.querySelector('#chat-which').options].find((o) => o.text === 'one')"
        await other.until(first_option)
        await other.run(
            f"(() => {{ const w = document.querySelector('#chat-which'); w.value = {first_option}.value; "
            "w.dispatchEvent(new Event('change')); })()"
        )
        await ask(other, "one more", 2)
        await page.until("document.querySelectorAll('.bubble.user').length === 2")
        await ask(page, "a third", 3)
        await keeps([["one", "one more", "a third"], ["two"]])


async def test_the_dashboard_works_without_local_storage(page: Page, show: Show) -> None:
    """With all cookies blocked, accessing localStorage raises."""
    refuse = "get() { throw new DOMException('denied', 'SecurityError'); }"
    both = "".join(
        f"Object.defineProperty(window, '{kind}', {{ {refuse} }});"
        for kind in ("localStorage", "sessionStorage")
    )
    await page.call("Page.addScriptToEvaluateOnNewDocument", source=both)
    _, url = await show(*machines(), service=TalkingService())
    await page.open(f"{url}/#/cluster")
    await page.until(READY)
    await page.open(f"{url}/#/chat")
    await page.until("document.querySelector('#chat-model')?.value")
    await page.write("#message", "What is it?")
    await page.press("Enter")
    await page.until("document.querySelector('#talk').textContent.includes('short')")
    await page.click("button[aria-label='New conversation']")
    await page.until("document.querySelector('#chat-which').options.length === 2")


async def test_the_dashboard_works_below_a_path_of_a_reverse_proxy(page: Page, show: Show) -> None:
    _, url = await show(*machines())

    async def forward(request: web.Request) -> web.StreamResponse:
        seen.add(request.rel_url.raw_path)
        target = f"{url}/{request.match_info['rest']}?{request.query_string}"
        headers = {"Accept": request.headers.get("Accept", "")}
        body = await request.read()
        async with session.request(request.method, target, data=body, headers=headers) as answer:
            response = web.StreamResponse(status=answer.status)
            response.content_type = answer.content_type
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            return response

    seen: set[str] = set()
    app = web.Application()
    app.router.add_route("*", "/llm/{rest:.*}", forward)
    async with ClientSession() as session, TestServer(app, host="127.0.0.1") as server:
        above = f"http://127.0.0.1:{server.port}/llm"
        await page.open(f"{above}/#/cluster")
        await page.until(READY)
        await page.run("location.hash = '#/connect'")
        await page.until(f"document.querySelector('main').textContent.includes('{above}/v1')")
        await page.call("Page.navigate", url="about:blank")
        await page.until("location.href === 'about:blank'")
    assert {"/llm/api/cluster", "/llm/api/cluster/events", "/llm/web/dashboard.css"} <= seen


async def test_a_hidden_tab_holds_no_connection(page: Page, show: Show) -> None:
    given, url = await show(*machines())
    followed = 0
    next_events = given.monitor.next_events

    async def counted(seen: int, timeout: float) -> list[Event]:
        nonlocal followed
        followed += 1
        try:
            return await next_events(seen, timeout)
        finally:
            followed -= 1

    given.monitor.next_events = counted  # type: ignore[method-assign]
    await page.open(f"{url}/#/cluster")
    await page.until(READY)
    await until(lambda: followed == 1)
    looked = "Object.defineProperty(document, 'hidden', { configurable: true, get: () => %s });"
    changed = "document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))"
    await page.run(looked % "true" + changed)
    await until(lambda: followed == 0)
    await page.run(looked % "false" + changed)
    await until(lambda: followed == 1)


async def test_an_upgrade_of_the_node_is_announced_in_open_pages(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/cluster")
    await page.until(READY)
    assert await page.run("document.querySelector('#upgraded').hidden")
    cluster = cluster_of(given)
    cluster.records = tuple(replace(node, release="0.9.0") for node in cluster.records)
    await page.until("!document.querySelector('#upgraded').hidden")
    await page.click("#upgraded button")
    await page.until("document.querySelector('#upgraded')?.hidden")


async def test_requests_history_connect_and_doctor(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/requests")
    await page.until("document.querySelectorAll('tbody tr').length === 12")
    assert "ok, resumed" in await page.run("document.querySelector('tbody').innerText")
    await page.run("location.hash = '#/history'")
    await page.until("document.querySelectorAll('.plot-line[d^=M]').length > 5")
    label = await page.run("document.querySelector('.plot-figure').getAttribute('aria-label')")
    assert label.startswith("Tokens generated per second: now ")
    pressed = "document.querySelector('.segments [aria-pressed=true]')?.textContent"
    assert await page.run(pressed) == "10 minutes"
    await page.run("[...document.querySelectorAll('.segments button')].at(-1).click()")
    assert await page.run(pressed) == "1 day"
    await page.until("document.querySelector('.plot-figure').textContent.includes('24 h ago')")
    await page.run("location.hash = '#/connect'")
    await page.until("document.querySelector('#connect-model')?.value")
    text = await page.run("document.querySelector('.snippets').innerText")
    for words in (
        "Open WebUI",
        "Continue",
        "Claude Code",
        "Codex",
        "LangChain",
        f"OLLAMA_HOST={url}",
        "openai",
    ):
        assert words in text
    await page.run("location.hash = '#/doctor'")
    cluster_of(given).change(*machines()[:4])
    await page.until("document.querySelector('.events').innerText.includes('emil stopped responding')")
    await page.run("[...document.querySelectorAll('.title-row button')].at(-1).click()")
    await page.until("document.querySelector('.fix code')?.textContent === 'sollold forget emil'")
    # Only the command of a fix can be copied.
    door = replace(machines()[0], door_until=time.time() + 600)
    cluster_of(given).change(door, *machines()[1:4])
    await page.run("[...document.querySelectorAll('.title-row button')].at(-1).click()")
    codes = "[...document.querySelectorAll('.fix code')].map((e) => e.textContent).join()"
    await page.until(f"{codes} === 'sollold forget emil,sollold cluster close'")
    assert "to end that now:" in await page.run("document.querySelector('.findings').innerText")
    assert await page.run("document.querySelector('#finding-count').textContent") == "1"


async def test_keys_are_created_shown_once_and_revoked(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/keys")
    await page.until("document.querySelector('main').innerText.includes('without a key')")
    await page.write("#key-name", "lap top")
    await page.run("document.querySelector('#key-scope').value = 'models'")
    await page.run("document.querySelector('#key-end').value = '30d'")
    await page.press("Enter")
    secret = await page.until("document.querySelector('.fix code')?.textContent")
    assert given.keys is not None
    (key,) = given.keys.all()
    assert (
        given.keys.find(secret) == key
        and key.scope is Scope.MODELS
        and key.expires - key.created == 30 * 86400
    )
    row = await page.until("document.querySelector('tbody tr')?.innerText")
    assert "lap top" in row and "use, load, pull and delete models" in row and "expires" in row
    # A duplicate name is refused with the node's message.
    await page.write("#key-name", "lap top")
    await page.press("Enter")
    await page.until("document.querySelector('main .bad').innerText.includes('already exists')")
    await page.click("tbody button")
    await page.click("tbody button.danger")
    await page.until("document.querySelector('tbody tr').innerText.includes('revoked')")
    assert given.keys.find(secret) is None and not await page.run("document.querySelector('tbody button')")


async def test_without_a_key_nothing_is_claimed(page: Page, show: Show) -> None:
    given, url = await show(trusted_proxies=TRUSTED_PROXIES)
    assert given.keys is not None
    _, secret = await given.keys.create("laptop", Scope.INFER)
    await page.call("Network.enable")
    await page.call("Network.setExtraHTTPHeaders", headers=REMOTE)
    for view in VIEWS:
        await page.open(f"{url}/#/{view}")
        await page.until("document.querySelector('#trouble').innerText.includes('an API key is needed')")
        assert await page.run("document.querySelector('main').hidden"), view
    assert await page.run("document.querySelector('#headline').innerText") == "not logged in"

    async def log_in(key: str) -> None:
        await page.click("#login")
        await page.write("#key-field", key)
        await page.press("Enter")

    await log_in("sollold_0")
    await page.until("document.querySelector('#trouble').innerText.includes('not known to this cluster')")
    # Such a key could not even be sent.
    await log_in("gehört mir")
    assert not await page.run("document.querySelector('dialog[open] input').checkValidity()")
    await page.run("[...document.querySelectorAll('dialog button')][1].click()")
    await page.until("!document.querySelector('dialog')")
    await log_in(f" {secret} ")
    await page.until(READY)
    assert not await page.run("document.querySelector('main').hidden")
    await given.keys.revoke("laptop")
    await page.until("document.querySelector('#trouble').innerText.includes('revoked')")
    assert await page.run("document.querySelector('main').hidden")
    # The event stream was cut off.
    await drop_network_errors(page)


async def test_keyboard_and_screen_reader(page: Page, show: Show) -> None:
    _, url = await show()
    for view in VIEWS:
        await page.open(f"{url}/#/{view}")
        await page.until(READY)
        nameless = await page.run(
            "[...document.querySelectorAll('button, a, input, select, textarea, [role=img]')].filter((e) => "
            "!(e.textContent.trim() || e.ariaLabel || e.labels?.length || e.placeholder))"
            ".map((e) => e.outerHTML)"
        )
        assert nameless == [], view
        assert await page.run("document.querySelectorAll('h1:not(header h1)').length") == 1
        assert await page.run("document.querySelectorAll('[aria-current=page]').length") == 1
        twice = await page.run(
            "[...document.querySelectorAll('[id]')].map((e) => e.id)"
            ".filter((id, at, all) => all.indexOf(id) !== at)"
        )
        assert twice == []
    # Answers are not a live region; only the line that announces their end is.
    assert await page.run("[...document.querySelectorAll('[aria-live]')].map((e) => e.id)") == ["said"]
    await page.open(url)
    await page.until("document.querySelector('.machine')")
    await page.press("Tab")
    assert await page.run("document.activeElement.textContent") == "Skip to the content"


async def test_the_skip_link_stays_in_the_view(page: Page, show: Show) -> None:
    _, url = await show()
    await page.open(f"{url}/#/doctor")
    await page.until(READY)
    await page.press("Tab")
    await page.press("Enter")
    await page.until("document.activeElement.id === 'content'")
    assert await page.run("document.activeElement.dataset.view") == "doctor"
    assert await page.run("location.hash") == "#/doctor"


async def test_the_focus_returns_when_a_question_is_cancelled(page: Page, show: Show) -> None:
    given, url = await show()
    await page.open(f"{url}/#/models")
    model = "[data-model='llama3.3:70b']"
    for act in ("Copy", "Delete"):
        await page.click(f"{model} [data-act={act}]")
        await page.run(f"document.querySelector(`{model} .model-panel button:last-of-type`).focus()")
        assert await page.run("document.activeElement.textContent") == "Cancel"
        await page.press("Enter")
        await page.until(f"document.activeElement.dataset.act === '{act}'")
    assert given.keys is not None
    await given.keys.create("laptop", Scope.INFER)
    await page.open(f"{url}/#/keys")
    await page.click("[aria-label='Revoke laptop']")
    await page.run("document.querySelector(`[aria-label='Cancel laptop']`).focus()")
    await page.press("Enter")
    await page.until("document.activeElement.ariaLabel === 'Revoke laptop'")


@pytest.mark.parametrize(
    ("view", "button", "wanted"),
    [
        ("doctor", "Check again", "Check again"),
        ("model/llama3.3%3A70b", "Show", "alpha llama-server"),
        ("chat", "Send", "Message"),
        ("chat", "Regenerate", "Message"),
    ],
)
async def test_the_keyboard_keeps_its_place(
    page: Page, show: Show, view: str, button: str, wanted: str
) -> None:
    _, url = await show()
    await page.open(f"{url}/#/{view}")
    await page.until(READY)
    if view == "chat":
        await page.until("document.querySelector('#chat-model').value")
        await page.write("#message", "What is this?")
    if button == "Regenerate":
        await page.press("Enter")
    found = f"[...document.querySelectorAll('button')].find((b) => b.textContent === '{button}')"
    await page.until(found)
    # Chromium shows the focus if it came by the keyboard.
    await page.press("Tab")
    await page.run(f"{found}.focus()")
    await page.press("Enter")
    focused = "document.activeElement.ariaLabel || document.activeElement.textContent"
    await page.until(f"({focused}) === '{wanted}' && !document.activeElement.disabled")
    if view == "chat":
        await page.until("document.querySelector('.assistant .foot button')")
    assert await page.run(focused) == wanted


async def test_the_focus_moves_to_what_replaces_a_button(page: Page, show: Show) -> None:
    anna, *others = machines()
    given, url = await show(anna, *others)
    await page.open(url)
    await page.until(READY)
    await page.run(f"document.querySelector(`[data-node='{anna.node}'] button`).focus()")
    cluster_of(given).change(replace(anna, draining=True), *others)
    await page.until("document.activeElement.textContent === 'Take requests again'")


async def test_a_machine_waiting_for_admission_is_shown_with_its_code(page: Page, show: Show) -> None:
    waiting = (WaitingMachine("f" * 16, "<i>gina</i>", "4711-0815"),)
    _, url = await show(replace(machines()[0], waiting=waiting), *machines()[1:])
    for view in ("cluster", "doctor"):
        await page.open(f"{url}/#/{view}")
        text = await page.until("document.querySelector('.waiting')?.innerText")
        assert "<i>gina</i> shows the code 4711-0815" in text and "sollold admit 4711-0815" in text
        assert await page.run("document.querySelector('.waiting i')") is None


async def test_engine_logs_are_shown(page: Page, show: Show) -> None:
    _, url = await show()
    await page.open(f"{url}/#/model/llama3.3%3A70b")
    await page.until("document.querySelector('.plan')")
    await page.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'Show').click()")
    await page.until(
        "document.querySelector('details summary') && document.querySelector('details pre').innerText"
    )

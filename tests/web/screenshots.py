"""`make screenshots`: each page of the dashboard in light, in dark, and at the width of a phone."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

from aiohttp import ClientSession

from sollold.api.http.application import Listener, build_app
from sollold.api.http.services import AppServices
from sollold.control.keys import Scope
from sollold.errors import Fault, Refusal
from sollold.settings.schema import HttpSettings
from tests.web.browser import PROGRAM, Browser, Page, chromium
from tests.web.scene import cluster_of, machines, services

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
    "leaderless",
)
LEADERLESS = VIEWS[-1]
"""The first page after the loss of a majority with the leader; commands fail."""
LOOKS = {"light": (1180, 820, False), "dark": (1180, 820, True), "phone": (390, 844, False)}


async def prepare(page: Page, view: str) -> None:
    """Bring a view into the state to be shown."""
    await page.until("document.querySelector('h1')")
    await page.until("Number(document.querySelector('#finding-count').textContent) > 0")
    if view == "cluster":
        await page.until("document.querySelectorAll('.events li').length > 1")
        await page.until(
            "document.querySelectorAll('.machine').length > 5 && document.querySelector('.spark-line[d]')"
        )
    elif view == "models":
        await page.until("document.querySelectorAll('.model').length > 3")
        await page.click("[data-model='llama3.3:70b'] [data-act=Plan]")
        await page.until("document.querySelector('.plan')")
    elif view.startswith("model/"):
        await page.until("document.querySelector('.plan') && document.querySelector('.facts dd')")
    elif view == "chat":
        await page.until("document.querySelector('#chat-model').value")
        await page.click("[aria-label='New conversation']")
        await page.write("#message", "What does this cluster do?")
        await page.press("Enter")
        await page.until("document.querySelector('.assistant .foot button')")
    elif view == "requests":
        await page.until("document.querySelectorAll('tbody tr').length > 5")
    elif view == "history":
        await page.run("document.querySelectorAll('.segments button')[1].click()")
        await page.until("document.querySelectorAll('.plot-line').length > 6")
    elif view == "connect":
        await page.until("document.querySelector('#connect-model').value")
    elif view == "keys":
        await page.until("document.querySelectorAll('tbody tr').length > 2")
    elif view == "doctor":
        await page.until("document.querySelectorAll('.finding').length > 0")
    elif view == LEADERLESS:
        await page.until("!document.querySelector('#leaderless').hidden")
        await page.click(".run button")
        await page.until("!document.querySelector('#failed').hidden")
    await asyncio.sleep(0.2)


def remove_majority(given: AppServices) -> None:
    """Remove three of five machines, including the leader."""
    cluster = cluster_of(given)
    cluster.leads = False
    cluster.refusal = Refusal(Fault.UNAVAILABLE, "the cluster has no leader right now; try again")
    cluster.change(*machines()[:1], machines()[3])


async def take(devtools: str, folder: Path, views: tuple[str, ...] = VIEWS) -> None:
    """Write ``VIEW-LOOK.png`` for every view and look."""
    lost = replace(machines()[4], node="f" * 16, name="fritz", addresses=("192.168.1.16",))
    async with services(*machines(), lost, still=True) as given, ClientSession() as session:
        browser = Browser(devtools, session)
        cluster, keys = cluster_of(given), given.keys
        assert keys is not None
        cluster.change(*machines())
        draining = replace(machines()[2], draining=True)
        cluster.change(*machines()[:2], draining, *machines()[3:])
        await keys.create("open-webui", Scope.INFER)
        await keys.create("build server", Scope.MODELS, 90 * 86400)
        await keys.create("old laptop", Scope.ADMIN)
        await keys.revoke("old laptop")
        facts = HttpSettings(host="127.0.0.1", port=0)
        listener = Listener(build_app(given, facts), facts, drain=0.2)
        await listener.start()
        try:
            for view, (look, (width, height, dark)) in itertools.product(views, LOOKS.items()):
                if view == LEADERLESS:
                    remove_majority(given)
                async with browser.page() as page:
                    await page.size(width, height, dark=dark)
                    await page.open(f"http://127.0.0.1:{listener.port}/#/{view}")
                    await prepare(page, view)
                    await page.screenshot(folder / f"{view.split('/')[0]}-{look}.png")
        finally:
            await listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/screenshots"))
    parser.add_argument("--view", action="append", choices=[view.split("/")[0] for view in VIEWS])
    arguments = parser.parse_args()
    if PROGRAM is None:
        parser.exit(1, "screenshots need Chromium (package chromium)\n")
    wanted = tuple(view for view in VIEWS if not arguments.view or view.split("/")[0] in arguments.view)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="sollold-chromium-") as profile,
        chromium(Path(profile)) as devtools,
    ):
        asyncio.run(take(devtools, arguments.folder, wanted))
    print(f"written to {arguments.folder}")


if __name__ == "__main__":
    main()

"""Generated pages of the documentation. ``python -m tests.docs.pages`` writes them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import cast

from sollold.api.cluster.metrics import Metrics
from sollold.api.cluster.openapi import REQUEST_HEADERS, RESPONSE_HEADERS
from sollold.api.http.application import all_routes
from sollold.api.http.inflight import InflightRequests
from sollold.api.http.request_log import ResponseCounts
from sollold.api.http.response import KeepAlive, ResponseContext
from sollold.api.http.route import Route
from sollold.cli.parser import ALIASES, EXIT_CODES, parser, subcommands
from sollold.serving.batch import Batches
from sollold.settings.catalogue import catalogue
from sollold.settings.document import documentation, toml_value
from sollold.settings.live import LIVE_KEYS
from tests.api.api_parts import parts

FOLDER = Path(__file__).parents[2] / "docs"
_TITLES = {
    "own": "The cluster's own",
    "ollama": "Ollama's",
    "openai": "OpenAI's",
    "anthropic": "Anthropic's",
    "others": "Others",
}
_OWN = ("/api/cluster", "/api/doctor", "/api/batch", "/metrics", "/health", "/ready")


def routes() -> list[Route]:
    """Return all routes of the API."""
    given = parts(admission=object())
    inflight = InflightRequests(given.monitor.activity)
    context = ResponseContext(given.service, KeepAlive(), inflight)
    metrics = Metrics(given, ResponseCounts(), {})
    return all_routes(given, context, metrics, cast(Batches, None))


def settings_page() -> str:
    """Return the text of ``settings.md``."""
    texts = documentation()
    lines = [
        "# Settings",
        "",
        "No setting is required. In order of precedence, a value comes from a flag (`--set http.port=8080`),",
        "the environment (`SOLLOLD_HTTP_PORT=8080`), the file (`/etc/sollold/sollold.toml`, or",
        "`~/.config/sollold/sollold.toml`) or the default. `sollold config` prints the values in effect and",
        "where each comes from.",
        "",
        'Sizes are bytes, or a string with a unit (`"20 GiB"`). Durations are seconds, or `"5m"`, `"1h30m"`.',
        "In variables and flags, lists are separated by commas, or written as in the file.",
        "",
        "`sudo systemctl reload sollold` applies changes of the file without interruption; settings marked",
        "*Restart* need `sudo systemctl restart sollold`. `sollold doctor` lists changes that wait for a",
        "restart, and the errors of a file that could not be loaded.",
    ]
    section = ""
    for key, setting in catalogue().items():
        if setting.section != section:
            section = setting.section
            head = ["| key | default | meaning |", "| --- | --- | --- |"]
            lines += ["", f"## {section}", "", texts[section], "", *head]
        meaning = " ".join(texts.get(key, "").split()).replace("|", "\\|").replace("<", "&lt;")
        meaning += "" if key in LIVE_KEYS else " *Restart.*"
        default = toml_value(setting, setting.default).replace("|", "\\|")
        lines.append(f"| `{key}` | `{default}` | {meaning} |")
    return "\n".join(lines) + "\n"


def _group(route: Route) -> str:
    if route.path.startswith(_OWN):
        return "own"
    if route.path.startswith("/api/"):
        return "ollama"
    if route.path.startswith("/v1/messages"):
        return "anthropic"
    return "openai" if route.path.startswith("/v1") else "others"


def api_page() -> str:
    """Return the text of ``api.md``."""
    lines = [
        "# API",
        "",
        "Every node serves all of these routes for the whole cluster, on port 11435. `/openapi.json`",
        "describes the bodies of requests and responses. The routes under `/api/` are also",
        "available under `/v1/api/`. `GET` routes answer `HEAD` too, except that of the events.",
    ]
    groups: dict[str, list[Route]] = {name: [] for name in _TITLES}
    for route in routes():
        groups[_group(route)].append(route)
    for name, title in _TITLES.items():
        lines += ["", f"## {title}", "", "| | route | |", "| --- | --- | --- |"]
        for route in groups[name]:
            query = "".join(f"; `{key}`: {text}" for key, text in route.query)
            lines.append(f"| {route.method} | `{route.path}` | {route.summary}{query} |")
    for title, headers in (
        ("Headers of requests", REQUEST_HEADERS),
        ("Headers of answers", RESPONSE_HEADERS),
    ):
        lines += ["", f"## {title}", "", "| | |", "| --- | --- |"]
        lines += [f"| `{name}` | {text} |" for name, text in headers.items()]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the text of ``commands.md``."""
    lines = [
        "# Commands",
        "",
        "`sollold COMMAND --help` prints the same. Commands that query a node accept `--node NODE` (its name",
        "in the cluster, its address or URL; default: `SOLLOLD_NODE_URL`, else this machine's node) and",
        "`--json`, before or after the command. They send the API key in `SOLLOLD_API_KEY`. Commands that",
        "read settings accept `--config FILE` (or `SOLLOLD_CONFIG`) and `--set SECTION.KEY=VALUE`.",
        "",
        f"Ollama's names work as well: {', '.join(f'`{word}` ({ours})' for word, ours in ALIASES.items())}.",
        "",
        "| exit status | |",
        "| --- | --- |",
    ]
    lines += [
        f"| {number} | {text} |" for number, text in re.findall(r"^  (\d)  (.*)$", EXIT_CODES, re.MULTILINE)
    ]
    for name, sub in subcommands(parser()).items():
        if name in ALIASES:
            continue
        lines += ["", f"## {name}", "", sub.description or ""]
        if sub.epilog:
            lines += ["", "```text", sub.epilog, "```"]
        rows = [(_spelled(action), action.help or "") for action in sub._actions]
        rows = [(spelled, text) for spelled, text in rows if spelled.split()[0] not in _EVERYWHERE]
        if rows:
            lines += ["", "| | |", "| --- | --- |"]
            lines += [f"| `{spelled}` | {text.replace('|', '&#124;')} |" for spelled, text in rows]
    return "\n".join(lines) + "\n"


_EVERYWHERE = ("-h,", "--node", "--json", "--config", "--set")


def _spelled(action: argparse.Action) -> str:
    """Return an option or argument as it is typed."""
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    if not action.option_strings:
        return str(value) if action.nargs not in ("?", "*") else f"[{value}]"
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


PAGES = {"settings.md": settings_page, "api.md": api_page, "commands.md": commands_page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()

"""The npm clients ``ollama`` and ``openai`` against a node without models."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sollold.models.gguf.demo_model import GREETING
from tests.api.picture import PICTURE
from tests.api.reciters import SEEN, THOUGHT
from tests.npm import fetched

pytestmark = [pytest.mark.llama, pytest.mark.clients, pytest.mark.timeout(240)]

NPM_FOLDER = Path(__file__).with_name("npm")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clients in the lock file."""
    return fetched(NPM_FOLDER, tmp_path_factory.mktemp("npm"), "the npm clients are")


@pytest.fixture(scope="module", params=["far", "at_ollama"])
def out(request: pytest.FixtureRequest, packages: Path) -> Any:
    """What the clients returned: client → feature → [whole answer, streamed answer]."""
    url = request.getfixturevalue(request.param)
    command = ("node", str(NPM_FOLDER / "talk.mjs"), str(packages), url, PICTURE)
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("client", ["ollama", "openai"])
@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        ("chat", GREETING),
        ("tools", {"zone": "utc"}),
        ("thinking", THOUGHT),
        ("images", SEEN),
    ],
)
def test_npm_client_whole_and_streamed(out: Any, client: str, feature: str, expected: Any) -> None:
    answers = [answer.strip() if isinstance(answer, str) else answer for answer in out[client][feature]]
    assert answers == [expected, expected]


@pytest.mark.parametrize("client", ["ollama", "openai"])
def test_npm_client_gets_json_of_the_schema(out: Any, client: str) -> None:
    assert [set(answer) for answer in out[client]["schema"]] == [{"age", "tall"}] * 2


def test_npm_ollama_generates_and_gets_done_once(out: Any) -> None:
    assert out["ollama"]["generate"] == [GREETING, GREETING]
    done = out["ollama"]["done"]
    assert done[-1] is True and not any(done[:-1])


def test_npm_openai_uses_responses_and_gets_token_counts(out: Any) -> None:
    assert out["openai"]["responses"] == [GREETING, GREETING]
    whole, streamed = out["openai"]["tokens"]
    assert whole == streamed > 10


def test_npm_clients_embed_list_and_report_missing_models(out: Any) -> None:
    assert out["ollama"]["embedded"] == 2 and out["openai"]["embedded"] > 8
    assert "demo:latest" in out["ollama"]["models"] and "demo:latest" in out["openai"]["models"]
    assert out["ollama"]["version"].count(".") == 2
    assert "not found" in out["ollama"]["missing"] and out["openai"]["missing"] == 404

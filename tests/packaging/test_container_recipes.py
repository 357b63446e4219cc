"""The Containerfiles, without building images."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sollold.cli.exit import Exit
from tests.doubles import free_port

RECIPES = sorted((Path(__file__).parents[2] / "packaging" / "container").glob("Containerfile*"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_container_without_a_responding_daemon_is_unhealthy(recipe: Path) -> None:
    found = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", recipe.read_text(), re.MULTILINE)
    assert found
    program, *words = json.loads(found[1])
    assert program == "sollold"
    environment = os.environ | {"SOLLOLD_CONFIG": os.devnull, "SOLLOLD_HTTP_PORT": str(free_port())}
    command = [sys.executable, "-m", "sollold", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == Exit.UNREACHABLE, done.stdout + done.stderr

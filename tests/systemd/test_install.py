"""Installation by the README's three lines on Debian machines with a real systemd."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollold.models.gguf.demo_model import Recital, counting, write
from sollold.settings.schema import MIB
from tests import netns
from tests.systemd import container
from tests.systemd.container import Container, until
from tests.systemd.packages import build

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 1000 * MIB
"""RAM of each machine in bytes. The daemon leaves 512 MiB of it to other programs."""
MODEL = "recital"
WORDS = 1500

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(1800)]


def lacking() -> str:
    if not shutil.which("dh") or not shutil.which("dpkg-buildpackage"):
        return "Debian packages need debhelper and dpkg-dev"
    return netns.available() or container.lacking()


if reason := lacking():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("newer"), "--without-llama", SOLLOLD_DEB_VERSION="99.0")[0]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Container]]:
    try:
        container.base()
    except OSError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("machines")
    with netns.Lan(3) as lan:
        made: list[Container] = []
        try:
            for index, name in enumerate(("anna", "bert", "cleo")):
                made.append(Container(lan[index], folder, name, MEMORY))
                made[-1].power_on()
            yield made
        finally:
            for machine in made:
                if machine.init:
                    print(f"--- {machine.name}\n{machine.journal()}")
                machine.remove()


@pytest.fixture(scope="module")
def cluster(machines: list[Container], packages: list[Path]) -> list[Container]:
    """Run the README's commands, and nothing else, on each machine."""
    lines = readme_lines()
    for machine in machines:
        for package in packages:
            shutil.copy(package, machine.root / "root")
        for line in lines:
            machine.type(f"cd /root && {line}", timeout=300)
    return machines


def readme_lines() -> list[str]:
    """Return the commands of the README's installation section without sudo, since they run as root."""
    section = (ROOT / "README.md").read_text().split("## Install it", 1)[1]
    block = section.split("```sh\n", 1)[1].split("```", 1)[0]
    lines = [line.removeprefix("sudo ") for line in block.strip().splitlines()]
    assert len(lines) == 3, "three lines, as the README promises"
    # apt's question can't be answered.
    return [line.replace("apt install", "apt-get install -y") for line in lines]


def status(machine: Container) -> dict[str, Any]:
    try:
        return dict(json.loads(machine.run(["sollold", "status", "--json"])))
    except (AssertionError, ValueError):
        return {}


def together(machines: list[Container], count: int) -> None:
    def seen() -> bool:
        states = [status(machine) for machine in machines]
        return all(
            len([node for node in state.get("nodes", []) if node["build"]]) == count for state in states
        )

    until(seen, f"{count} machines see each other")


def chat(machine: Container, words: int = 12) -> dict[str, Any]:
    line = f"curl -sS --max-time 240 http://localhost:11435/api/chat -d {body(words, stream=False)}"
    return dict(json.loads(machine.type(line, timeout=300)))


def streamed(machine: Container, words: int, file: str) -> list[dict[str, Any]]:
    """Return the records of a streamed answer, which is written to ``file`` on the machine as it arrives."""
    line = f"curl -sSN --max-time 900 http://localhost:11435/api/chat -d {body(words, stream=True)} >{file}"
    machine.type(line, timeout=920)
    return lines_of(machine, file)


def lines_of(machine: Container, file: str) -> list[dict[str, Any]]:
    """Return the complete records of a growing file of JSON lines on the machine."""
    text = (machine.root / file.removeprefix("/")).read_bytes()
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


def body(words: int, *, stream: bool) -> str:
    ask = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "count"}],
        "stream": stream,
        "options": {"num_predict": words, "temperature": 0},
    }
    return shlex.quote(json.dumps(ask))


def put_model(machine: Container) -> None:
    """Put a model that does not fit on one machine into the folder named in the README."""
    folder = machine.root / "var/lib/sollold/models"
    recital = Recital(counting(WORDS), name=MODEL, layers=24, width=512, hidden=9216)
    made = machine.root / "root" / f"{MODEL}.gguf"
    write(made, recital)
    made.chmod(0o644)
    made.rename(folder / made.name)


def test_three_machines_find_each_other(cluster: list[Container]) -> None:
    together(cluster, 3)
    for machine in cluster:
        assert machine.run(["systemctl", "is-active", "sollold"]).strip() == "active"
    words = ["systemctl", "status", "sollold", "--no-pager"]
    until(
        lambda: all("3 nodes" in machine.run(words, check=False) for machine in cluster),
        "systemctl status shows the nodes",
    )


def test_the_unit_is_hardened(cluster: list[Container]) -> None:
    text = cluster[0].run(["systemd-analyze", "security", "sollold", "--no-pager"], check=False)
    found = re.search(r"Overall exposure level for sollold.service: ([\d.]+)", text)
    assert found, text[-500:]
    assert float(found[1]) <= 3.0, text


def test_a_model_too_big_for_one_answers_from_the_others(cluster: list[Container]) -> None:
    together(cluster, 3)
    put_model(cluster[0])
    until(lambda: MODEL in cluster[2].run(["sollold", "models"], check=False), "the model is listed")
    for machine in cluster[1:]:
        answer = chat(machine)
        assert answer["message"]["content"].split()[:3] == ["w0001", "w0002", "w0003"], answer
        assert answer["_routing"]["backend"] == "llama.cpp-distributed"
    placed = status(cluster[1])["deployments"][0]["placed"]
    assert len({share["node"] for share in placed}) >= 2


def test_engines_belong_to_the_unit_and_journal_entries_name_the_deployment(cluster: list[Container]) -> None:
    together(cluster, 3)
    chat(cluster[1])
    (deployment,) = status(cluster[1])["deployments"]
    names = {node["node"]: node["name"] for node in status(cluster[1])["nodes"]}
    head = next(machine for machine in cluster if machine.name == names[deployment["node"]])
    pid = head.type("pgrep -o -x llama-server").strip()
    assert "sollold.service" in head.type(f"cat /proc/{pid}/cgroup")
    daemon = head.type("systemctl show -p MainPID --value sollold").strip()
    scores = [int(head.type(f"cat /proc/{process}/oom_score_adj")) for process in (daemon, pid)]
    assert scores[0] < scores[1]
    shown = ["systemctl", "status", "sollold", "--no-pager"]
    until(
        lambda: f"loaded: {MODEL}" in head.run(shown, check=False), "systemctl status shows the loaded model"
    )
    entries = head.type("journalctl -u sollold -o json --no-pager").splitlines()
    ready_entries = [
        entry for entry in map(json.loads, entries) if entry.get("SOLLOLD_DEPLOYMENT") == deployment["id"]
    ]
    assert any("is ready after" in str(entry["MESSAGE"]) for entry in ready_entries), entries[-5:]


def test_documentation_and_completions_are_installed(cluster: list[Container]) -> None:
    for file in (
        "usr/share/man/man1/sollold.1.gz",
        "usr/share/bash-completion/completions/sollold",
        "usr/share/zsh/vendor-completions/_sollold",
        "usr/share/fish/vendor_completions.d/sollold.fish",
        "etc/ufw/applications.d/sollold",
        "etc/sollold/sollold.toml",
        "usr/share/doc/sollold/guide/operating.md",
        "usr/share/doc/sollold/monitoring/alerts.yml",
        "usr/share/doc/sollold/reverse-proxy.md",
    ):
        assert (cluster[0].root / file).is_file(), file


def test_reload_names_settings_that_need_a_restart(cluster: list[Container]) -> None:
    machine = cluster[0]
    file = "/etc/sollold/sollold.toml"
    machine.type(
        f"""sed -i.before -e 's/^#level = .*/level = "debug"/' -e 's/^#reserve = .*/reserve = 1/' {file}"""
    )
    machine.type("systemctl reload sollold")
    until(
        lambda: "these settings need a restart: node.reserve" in machine.journal(200),
        "the setting is named in the journal",
    )
    doctor = ["sollold", "doctor"]
    pending = "these settings were changed and need a restart: node.reserve"
    until(lambda: pending in machine.run(doctor, check=False), "the doctor reports the setting")
    wrong = f"echo 'nonsense = 1' >>{file}; systemctl reload sollold || echo refused; mv {file}.before {file}"
    assert "refused" in machine.type(wrong)
    until(lambda: "settings not reloaded" in machine.journal(200), "a wrong file changes nothing")
    unread = "the settings could not be reloaded"
    until(lambda: unread in machine.run(doctor, check=False), "the doctor reports the file")
    machine.type("systemctl reload sollold")
    until(lambda: "settings" not in machine.run(doctor, check=False), "the doctor reports nothing")
    assert machine.run(["systemctl", "is-active", "sollold"]).strip() == "active"


def test_a_killed_daemon_is_restarted_and_leaves_no_engines(cluster: list[Container]) -> None:
    together(cluster, 3)
    chat(cluster[1])
    machine = cluster[0]
    before = machine.type("systemctl show -p MainPID --value sollold").strip()
    old = set(machine.type("pgrep -f 'llama-server|rpc-server' || true").split())
    machine.type("systemctl kill --kill-who=main -s KILL sollold")

    def back() -> bool:
        now = machine.type("systemctl show -p MainPID --value sollold").strip()
        return now not in ("0", before) and bool(status(machine))

    until(back, "the daemon is back")
    remaining = set(machine.type("pgrep -f 'llama-server|rpc-server' || true").split())
    assert not old & remaining
    together(cluster, 3)
    assert chat(machine)["message"]["content"].startswith("w0001")


def test_the_package_is_upgraded_while_a_stream_runs(cluster: list[Container], newer: Path) -> None:
    together(cluster, 3)
    chat(cluster[1])
    state = status(cluster[1])
    names = {node["node"]: node["name"] for node in state["nodes"]}
    used = {share["node"] for share in state["deployments"][0]["placed"]}
    # A machine that holds layers but does not receive the request.
    victim = next(m for m in cluster if m.name in {names[n] for n in used} and m.name != cluster[2].name)
    receiver, file = cluster[2], "/root/stream"
    victim.type("echo '# mine' >>/etc/sollold/sollold.toml")
    node = status(victim)["me"]
    # Long enough to be running when the daemon stops. On a slow machine it exceeds the drain limit and
    # continues after the daemon's return.
    words = 400
    got: list[dict[str, Any]] = []
    runner = threading.Thread(target=lambda: got.extend(streamed(receiver, words, file)))
    runner.start()
    until(
        lambda: (receiver.root / "root/stream").exists() and len(lines_of(receiver, file)) > 3,
        "the stream runs",
    )
    shutil.copy(newer, victim.root / "root/newer.deb")
    assert not lines_of(receiver, file)[-1].get("done"), "the stream was over before the upgrade"
    # dpkg must not ask about the settings file, which has new comments and was changed here.
    victim.type("apt-get install -y /root/newer.deb", timeout=300)
    runner.join(940)
    assert not runner.is_alive()
    assert got[-1].get("done"), got[-1]
    text = "".join(line["message"]["content"] for line in got).split()
    assert text == [f"w{number:04d}" for number in range(1, words + 1)], (text[:5], text[-5:])
    assert "99.0" in victim.run(["dpkg-query", "-W", "sollold"])
    together(cluster, 3)
    assert status(victim)["me"] == node
    settings = victim.type("cat /etc/sollold/sollold.toml")
    assert "# mine" in settings and "# As of sollold 99.0." not in settings
    assert chat(victim)["message"]["content"].startswith("w0001")


def test_unchanged_settings_are_replaced_by_the_new_releases(cluster: list[Container], newer: Path) -> None:
    machine = cluster[2]
    assert "# As of sollold 99.0." not in machine.type("cat /etc/sollold/sollold.toml")
    shutil.copy(newer, machine.root / "root/newer.deb")
    machine.type("apt-get install -y /root/newer.deb", timeout=300)
    assert machine.type("cat /etc/sollold/sollold.toml").startswith("# As of sollold 99.0.")
    assert machine.type("stat -c '%U %G %a' /etc/sollold/sollold.toml").strip() == "root sollold 640"
    together(cluster, 3)


def test_a_machine_is_powered_off_and_on(cluster: list[Container]) -> None:
    together(cluster, 3)
    cluster[1].power_off()
    together([cluster[0], cluster[2]], 2)
    cluster[1].power_on()
    together(cluster, 3)
    assert chat(cluster[1])["message"]["content"].startswith("w0001")


def test_removal_keeps_settings_and_state_and_purge_keeps_only_models(cluster: list[Container]) -> None:
    machine = cluster[2]
    machine.type("echo '# mine' >> /etc/sollold/sollold.toml; touch /var/lib/sollold/models/mine.gguf")
    machine.type("apt-get remove -y sollold", timeout=200)
    assert machine.type("systemctl is-active sollold; true").strip() == "inactive"
    together(cluster[:2], 2)
    assert "# mine" in machine.type("cat /etc/sollold/sollold.toml")
    assert machine.type("ls /var/lib/sollold").split()
    machine.type("apt-get purge -y sollold", timeout=200)
    assert machine.type("ls /etc/sollold /var/cache/sollold 2>/dev/null; true").strip() == ""
    assert machine.type("ls /var/lib/sollold").split() == ["models"]
    assert "mine.gguf" in machine.type("ls /var/lib/sollold/models")


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not installed")
def test_lintian_finds_no_errors(packages: list[Path]) -> None:
    words = ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0", *map(str, packages)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

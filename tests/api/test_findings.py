"""Findings: each problem is reported once, with a fix, problems before notices."""

from __future__ import annotations

from dataclasses import replace

from sollold.cluster.gossip.double import Double
from sollold.cluster.gossip.record import Backend, Endpoint, Record, State
from sollold.cluster.net.mdns import DiscoveryStatus
from sollold.cluster.net.reach_check import Unreached
from sollold.cluster.net.status import ClusterStatus
from sollold.control.doctor import examine
from sollold.control.events import LayersHeld, OfflineNode
from sollold.control.finding import Facts, Grade
from sollold.control.load_crashes import CrashingNode
from sollold.engines.llamacpp.exit_reason import exit_reason
from sollold.leader.pinned import LostModel
from sollold.machine.device import Device, Kind
from sollold.machine.external_worker import ExternalState, ExternalWorker
from sollold.models.model import Model
from sollold.settings.schema import GIB

CPU = Device("CPU", Kind.CPU, "x", 8 * GIB, 8 * GIB, 8 * GIB, 0, 8 * GIB)
ANNA = Record(
    "aa", "anna", 1, ("10.0.0.1",), 1, 2, "0", build="b1", setup="ready", devices=(CPU,), open=False
)
BERT = replace(ANNA, node="bb", name="bert", addresses=("10.0.0.2",))
HEALTHY = Facts(ANNA, (ANNA, BERT), (), (), "", 100 * GIB, "/cache")
MDNS = DiscoveryStatus(True, "", ("10.0.0.1",), ("bb",), 0)
NETWORK = ClusterStatus(MDNS, ("bb",), 0, {}, (), False)


def test_a_healthy_cluster_has_no_findings() -> None:
    assert examine(HEALTHY) == []
    assert examine(replace(HEALTHY, network=NETWORK)) == []
    assert examine(replace(HEALTHY, network=replace(NETWORK, discovery=None))) == []


def test_problems_come_before_notices() -> None:
    failed = Endpoint("d", "big", "", Backend.LOCAL, State.FAILED, reason="out of memory")
    bad = Model("odd:latest", "d", "folder", (), 1, 0.0, unusable="truncated")
    me = replace(ANNA, build="", open=True, endpoints=(failed,))
    old = replace(BERT, build="b0")
    new = replace(BERT, node="cc", name="cleo", build="b1")
    facts = Facts(me, (me, old, new), (bad,), (("no multicast", "set seeds"),), "no g++", GIB, "/cache")
    findings = examine(facts)
    grades = [finding.grade for finding in findings]
    assert grades == sorted(grades, key=lambda grade: grade is Grade.NOTICE)
    text = "\n".join(f"{finding.what} → {finding.fix}" for finding in findings)
    for expected in ("no g++", "b0 on bert", "out of memory", "odd:latest", "no multicast → set seeds",
                  "sollold cluster secure", "1.00 GiB free"):  # fmt: skip
        assert expected in text


def test_a_node_with_unreadable_fields_is_named_with_its_release() -> None:
    later = replace(BERT, release="9.0.0", build="")
    status = replace(NETWORK, unread={"bb": ("endpoints",), "gone": ("tls",)})
    (finding,) = examine(replace(HEALTHY, live=(ANNA, later), network=status))
    assert "bert runs sollold 9.0.0" in finding.what and "(endpoints)" in finding.what
    assert finding.fix.startswith("upgrade")


def test_the_limit_of_a_control_group_is_named() -> None:
    (finding,) = examine(replace(HEALTHY, group=(GIB, 64 * GIB)))
    assert finding.grade is Grade.NOTICE and "1.00 GiB of the machine's 64.0 GiB" in finding.what


def test_findings_about_files_are_limited() -> None:
    files = tuple((f"m is /a/{number}.gguf", "rename one of the files") for number in range(3000))
    findings = examine(replace(HEALTHY, files=files))
    assert len(findings) == 21
    assert findings[-1].what == "2980 more problems with models' files and folders" and findings[-1].fix


def test_repeated_failures_are_one_finding_and_a_notice_once_the_model_runs_again() -> None:
    reason = exit_reason(-9, [])
    failed = Endpoint("d", "big:7b", "", Backend.LOCAL, State.FAILED, reason=reason, loaded=False)
    me = replace(ANNA, endpoints=(failed, replace(failed, id="e")))
    (finding,) = examine(replace(HEALTHY, live=(me, BERT)))
    assert finding.grade is Grade.PROBLEM
    assert finding.what.startswith("big:7b on anna failed 2 times: it was killed")
    assert "node.reserve" in finding.fix and "`sollold logs big:7b`" in finding.fix
    other = replace(failed, reason="it exited with code 1: no such file")
    (finding,) = examine(replace(HEALTHY, live=(replace(ANNA, endpoints=(other,)), BERT)))
    assert finding.what.startswith("big:7b on anna failed: it exited") and "node.reserve" not in finding.fix
    again = replace(failed, id="f", state=State.READY, loaded=True, reason="")
    (finding,) = examine(replace(HEALTHY, live=(me, replace(BERT, endpoints=(again,)))))
    assert finding.grade is Grade.NOTICE and finding.what.endswith("It runs again, on bert")


def test_a_node_on_which_every_model_crashes_is_named_with_what_to_do() -> None:
    reason = f"llama-server: {exit_reason(-11, [])}"
    failed = Endpoint("d", "a:1b", "", Backend.LOCAL, State.FAILED, reason=reason, culprit="bb", crashed=True)
    node = CrashingNode("bb", "bert", "b1", ("a:1b", "b:1b"), reason)
    bert = replace(BERT, endpoints=(failed,))
    (finding,) = examine(replace(HEALTHY, live=(ANNA, bert), crashing=(node,)))
    assert finding.grade is Grade.PROBLEM and finding.fix.startswith("on bert: ")
    assert finding.what.startswith("llama.cpp b1 on bert crashes with every model, last a:1b, b:1b: ")
    assert finding.what.endswith("SIGSEGV")
    node = replace(node, node="aa", name="anna", models=("a:1b",))
    (finding,) = examine(replace(HEALTHY, crashing=(node,)))
    assert finding.fix.startswith("load another model there") and "remove /cache/llama.cpp" in finding.fix


def test_a_lost_pinned_model_is_a_problem() -> None:
    (finding,) = examine(replace(HEALTHY, lost=(LostModel("big:7b", "bert", 90.0, "It does not fit."),)))
    assert finding.grade is Grade.PROBLEM and "sollold plan big:7b" in finding.fix
    assert "gone from bert for 1 min 30 s" in finding.what and finding.what.endswith("It does not fit.")


def test_a_truncated_file_is_named_with_its_path_and_a_fix() -> None:
    bad = Model("odd:latest", "d", "folder", ("/models/odd.gguf",), 1, 0.0, unusable="The file is truncated.")
    (finding,) = examine(replace(HEALTHY, models=(bad,)))
    assert finding.what == "odd:latest (folder, /models/odd.gguf) can't be used: The file is truncated."
    assert "copy it again" in finding.fix
    (finding,) = examine(replace(HEALTHY, models=(replace(bad, unusable="unknown model architecture"),)))
    assert not finding.fix


def test_findings_about_unusable_models_are_limited() -> None:
    many = tuple(
        Model(f"m{k}:latest", f"{k}", "folder", (), 1, 0.0, unusable="no model") for k in range(5000)
    )
    findings = examine(replace(HEALTHY, models=many))
    assert len(findings) < 50
    assert (
        findings[-1].what.endswith(" more models can't be used")
        and findings[-1].fix == "sollold models --all"
    )
    named_count = sum("m" in finding.what and "no model" in finding.what for finding in findings)
    assert findings[-1].what.startswith(str(5000 - named_count))


def test_nodes_of_one_release_are_not_told_to_upgrade_for_the_same_llama_cpp() -> None:
    new = replace(BERT, build="b9")
    (finding,) = [
        finding
        for finding in examine(replace(HEALTHY, live=(ANNA, new)))
        if "different builds" in finding.what
    ]
    assert "llama.server" in finding.fix and "upgrade" not in finding.fix
    new = replace(new, release="9.9")
    (finding,) = [
        finding
        for finding in examine(replace(HEALTHY, live=(ANNA, new)))
        if "different builds" in finding.what
    ]
    assert "upgrade sollold" in finding.fix


def test_an_unwritable_state_folder_is_a_problem() -> None:
    (finding,) = examine(replace(HEALTHY, state="/state", unwritable="No space left on device"))
    assert finding.grade is Grade.PROBLEM and finding.what.startswith(
        "/state can't be written to: No space left"
    )
    assert "free some space" in finding.fix


def test_a_door_setting_overridden_by_a_secret_is_a_notice() -> None:
    (finding,) = examine(replace(HEALTHY, outdated_door=True))
    assert finding.grade is Grade.NOTICE and "precedence" in finding.what and "cluster.door" in finding.fix


def test_pending_and_unreadable_settings_are_found() -> None:
    (finding,) = examine(replace(HEALTHY, held=("node.reserve", "http.port")))
    assert finding.grade is Grade.NOTICE and finding.what.endswith("a restart: node.reserve, http.port")
    assert finding.fix == "sudo systemctl restart sollold"
    (finding,) = examine(replace(HEALTHY, unread="sollold.toml:3: unknown section [htpp]"))
    assert finding.grade is Grade.PROBLEM and finding.what.endswith("sollold.toml:3: unknown section [htpp]")


def test_an_unusable_gpu_is_found() -> None:
    (finding,) = examine(replace(HEALTHY, idle_gpus=("RTX 9090",)))
    assert "b1 here can't use RTX 9090" in finding.what and "toolkit" in finding.fix
    # Nothing is known before llama.cpp is installed.
    assert all("RTX" not in finding.what for finding in examine(
        replace(HEALTHY, me=replace(ANNA, build=""), idle_gpus=("RTX 9090",))
    ))  # fmt: skip


def test_a_gpu_build_without_gpus_is_a_notice() -> None:
    (finding,) = examine(replace(HEALTHY, absent_gpus=("CUDA",)))
    assert "built for CUDA, but no GPU was found: models run on the processor" in finding.what
    assert finding.grade is Grade.NOTICE and "--device nvidia.com/gpu=all" in finding.fix
    # If the driver lists a GPU, the other finding is right.
    (finding,) = examine(replace(HEALTHY, absent_gpus=("Vulkan",), idle_gpus=("RTX 9090",)))
    assert "can't use RTX 9090" in finding.what


def test_external_workers_are_a_notice_and_dead_ones_a_problem() -> None:
    dead = ExternalWorker("10.0.0.8:50052", ExternalState.DEAD, "nothing listens there")
    used = ExternalWorker("10.0.0.9:50052", ExternalState.TAKEN, "", "7.0.0", 1, GIB)
    me = replace(ANNA, plain=(used, dead))
    problem, notice = examine(replace(HEALTHY, me=me, live=(me, BERT)))
    assert problem.grade is Grade.PROBLEM and "10.0.0.8:50052" in problem.what
    assert "nothing listens there" in problem.what and "rpc_backends" in problem.fix
    assert notice.grade is Grade.NOTICE and "10.0.0.9:50052" in notice.what and "unencrypted" in notice.what


def test_a_node_that_multicast_does_not_reach_is_a_notice() -> None:
    (finding,) = examine(replace(HEALTHY, network=replace(NETWORK, unheard=("bert",))))
    assert finding.grade is Grade.NOTICE and finding.what.startswith("bert: alive on this network")
    assert "seeds" in finding.fix


def test_nodes_with_the_same_name_are_found() -> None:
    (finding,) = examine(replace(HEALTHY, live=(ANNA, replace(BERT, name="Anna", addresses=("10.0.0.2",)))))
    assert finding.grade is Grade.NOTICE and "2 nodes are called anna (10.0.0.1, 10.0.0.2)" in finding.what
    assert "node.name" in finding.fix


def test_machines_with_the_same_address_are_found() -> None:
    bert = replace(BERT, addresses=ANNA.addresses)
    for facts in (
        replace(HEALTHY, live=(ANNA, bert)),
        replace(HEALTHY, live=(ANNA,), offline=(OfflineNode(1000.0, False, bert),)),
    ):
        (finding,) = [finding for finding in examine(facts) if "same IP address" in finding.what]
        assert "anna and bert have the same IP address and port, 10.0.0.1:2" in finding.what
        assert finding.grade is Grade.NOTICE and "DHCP" in finding.fix
    # A node that was stopped may have left its address to another one.
    stopped = replace(HEALTHY, live=(ANNA,), offline=(OfflineNode(1000.0, True, bert),))
    for facts in (replace(HEALTHY, live=(ANNA, replace(bert, peer_port=3))), stopped):
        assert not any("same IP address" in finding.what for finding in examine(facts))


def test_machines_with_the_same_id_are_found() -> None:
    double = Double("bb", "10.0.0.2", "10.0.0.9")
    (finding,) = examine(replace(HEALTHY, network=replace(NETWORK, doubles=(double,))))
    assert finding.grade is Grade.PROBLEM and "node-key" in finding.fix
    assert "id of bert: 10.0.0.2, which takes part in the cluster, and 10.0.0.9, which does" in finding.what


def test_a_single_node_gets_a_notice_about_firewalls() -> None:
    (finding,) = examine(replace(HEALTHY, live=(ANNA,)))
    assert "firewall" in finding.what and finding.grade is Grade.NOTICE
    assert "the secret is the same" in finding.what


def test_reasons_why_nodes_do_not_find_each_other() -> None:
    broken = replace(MDNS, working=False, reason="No such device")
    (finding,) = examine(replace(HEALTHY, network=replace(NETWORK, discovery=broken)))
    assert finding.grade is Grade.PROBLEM and "No such device" in finding.what and "seeds" in finding.fix
    cloned = replace(HEALTHY, network=replace(NETWORK, cloned=True), id_file="/var/lib/sollold/node-id")
    (finding,) = examine(cloned)
    assert finding.grade is Grade.PROBLEM and "rm /var/lib/sollold/node-id" in finding.fix
    other = replace(NETWORK, discovery=replace(MDNS, foreign=2))
    (finding,) = examine(replace(HEALTHY, network=other))
    assert finding.grade is Grade.NOTICE and "2 nodes of another cluster" in finding.what
    # The secret is in the keyring, or in cluster.token where that is set.
    assert finding.what.endswith("they have another secret")
    assert "delete the file keyring" in finding.fix and "`sollold token --show`" in finding.fix
    unlike = replace(NETWORK, discovery=replace(MDNS, unlike=("10.0.0.9",)), formats={"10.0.0.10": 3})
    (finding,) = examine(replace(HEALTHY, network=unlike))
    assert finding.grade is Grade.PROBLEM and "10.0.0.9, 10.0.0.10: the release there" in finding.what
    assert "upgrade sollold" in finding.fix
    waits = replace(ANNA, seeking="waits for admission to the cluster of bert; its code is ABCD-EFGH")
    (finding,) = examine(replace(HEALTHY, me=waits, live=(waits,), network=other))
    assert "waits for admission" in finding.what and "sollold admit anna" in finding.fix
    out = replace(ANNA, seeking="was evicted from the cluster of bert; its code is ABCD-EFGH")
    offline = (OfflineNode(1000.0, False, BERT),)
    (finding,) = examine(replace(HEALTHY, me=out, live=(out,), network=other, offline=offline))
    assert "was evicted" in finding.what


def test_an_open_door_is_found_despite_clock_differences() -> None:
    for until, ending in ((900.0, "to the cluster"), (1e9, "to the cluster"), (0.0, "")):
        findings = examine(replace(HEALTHY, live=(ANNA, replace(BERT, door_until=until)), now=1000.0))
        assert [finding.what.endswith(ending) for finding in findings] == [True] * bool(ending)
    me = replace(ANNA, door_until=1000.0 + 660)
    (finding,) = examine(replace(HEALTHY, me=me, live=(me, replace(BERT, door_until=1e9)), now=1000.0))
    assert finding.what.endswith("for another 11 min") and "cluster close" in finding.fix


def test_a_missing_node_is_a_problem_and_a_stopped_one_a_notice() -> None:
    held = (LayersHeld("big:latest", "CPU", 2, 5, 2 * GIB),)
    lost, stopped = OfflineNode(1000.0, False, BERT, held), OfflineNode(1000.0, True, BERT)
    first, second = examine(replace(HEALTHY, offline=(stopped, lost)))
    assert first.grade is Grade.PROBLEM and "bert has been offline since" in first.what
    assert "2.00 GiB of big:latest" in first.what and "sollold forget bert" in first.fix
    assert second.grade is Grade.NOTICE and "bert was stopped" in second.what


def test_an_unreachable_live_node_is_named_with_its_port() -> None:
    local = replace(ANNA, peer_port=11436)
    bert = replace(BERT, peer_port=11500)
    cleo = replace(BERT, node="cc", name="cleo")
    facts = replace(HEALTHY, me=local, live=(local, bert, cleo), network=NETWORK)
    why = "bert could not be reached (no answer within 2.5 s)"
    (finding,) = examine(replace(facts, unreached=(Unreached("bb", why),)))
    assert finding.grade is Grade.PROBLEM and "from this node at port 11500/tcp" in finding.what
    assert "11500/tcp" in finding.fix and "firewall of bert" in finding.fix
    why = "anna could not be reached (no answer within 2.5 s)"
    both = (Unreached("cc", why, inward=True), Unreached("bb", why, inward=True))
    (finding,) = examine(replace(facts, unreached=both))
    assert "from bert, cleo at port 11436/tcp" in finding.what and "this machine" in finding.fix


def test_nodes_that_udp_does_not_reach_are_named() -> None:
    local = replace(ANNA, peer_port=11436)
    bert = replace(BERT, peer_port=12000)
    cleo = replace(BERT, node="cc", name="cleo", peer_port=11436)
    facts = replace(HEALTHY, me=local, live=(local, bert, cleo))
    (finding,) = examine(replace(facts, network=replace(NETWORK, unanswered=("bert",))))
    assert finding.what.startswith("bert: datagrams to port 12000/udp")
    assert finding.fix == (
        "let 11436/udp in through the firewall of this machine; let 12000/udp in through the firewall of bert"
    )
    (finding,) = examine(replace(facts, network=replace(NETWORK, unanswered=("cleo",))))
    assert finding.what.startswith("cleo: datagrams to port 11436/udp")
    assert finding.fix.endswith("cleo and of this machine")
    (finding,) = examine(replace(facts, network=replace(NETWORK, unanswered=("cleo", "bert"))))
    assert finding.what.startswith("bert, cleo: ") and finding.fix.endswith("firewall of this machine")


def test_a_node_that_misses_all_others_is_probably_cut_off() -> None:
    gone = [
        OfflineNode(1e9, False, replace(BERT, node=name, name=name, addresses=()))
        for name in ("bert", "cleo")
    ]
    stopped = OfflineNode(1e9, True, replace(BERT, node="dan", name="dan"))
    cut_off, other = examine(replace(HEALTHY, live=(ANNA,), network=NETWORK, offline=(*gone, stopped)))
    assert "bert, cleo" in cut_off.what and "cut off" in cut_off.what and "forget" not in cut_off.fix
    assert other.what.startswith("dan was stopped")
    # While other nodes respond, the missing ones are at fault.
    assert len(examine(replace(HEALTHY, offline=tuple(gone)))) == 2
    found_alone = examine(replace(HEALTHY, live=(ANNA,), offline=tuple(gone[:1])))
    assert [finding.fix for finding in found_alone] == ["sollold forget bert"]


def test_an_unreachable_node_that_is_not_live_is_ignored() -> None:
    why = "bert could not be reached (no answer within 2.5 s)"
    assert examine(replace(HEALTHY, network=NETWORK, unreached=(Unreached("zz", why),))) == []


def test_a_node_that_large_packets_do_not_reach_is_found_with_the_mtu() -> None:
    (finding,) = examine(replace(HEALTHY, network=NETWORK, unreached=(Unreached("bb", "", large=True),)))
    assert finding.grade is Grade.PROBLEM and finding.what.startswith("bert accepts connections")
    assert "MTU" in finding.fix

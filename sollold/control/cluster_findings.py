"""What `sollold doctor` finds in the network and the cluster: missing, duplicate and admitted nodes. Pure."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence

from sollold.cluster.gossip.record import Record
from sollold.cluster.net.status import ClusterStatus
from sollold.control.events import OfflineNode
from sollold.control.finding import Facts, Finding, Grade
from sollold.natural_order import natural
from sollold.units import bytes_text

_SEED = 'name one other node in sollold.toml: `[cluster] seeds = ["HOST:11436"]`'
SAME_VERSION = "upgrade sollold on all nodes to the same version"
_MAX_ADDRESSES = 8
_LARGE_LOST = (
    "accepts connections from this node, but 32 KiB did not get there and back within 4 s: large packets "
    "probably get lost, so models that are spread over both nodes can't be loaded"
)
_MTU = (
    "give both machines an MTU that the network between them carries (`ip link` shows it; a VPN's is often "
    "1280 to 1420), and let ICMP through their firewalls"
)


def same_names(live: Sequence[Record]) -> list[Finding]:
    """Find nodes with the same name: images of machines are often copied with their host name."""
    addresses: dict[str, list[str]] = {}
    for record in live:
        addresses.setdefault(record.name.lower(), []).append(record.addresses[0] if record.addresses else "?")
    return [
        Finding(
            Grade.NOTICE,
            f"{len(hosts)} nodes are called {name} ({', '.join(sorted(hosts))}): messages and commands that "
            "name one can't tell them apart",
            "give each machine its own host name (`sudo hostnamectl hostname NAME`) or set node.name in its "
            "sollold.toml, then `sudo systemctl restart sollold` there",
        )
        for name, hosts in sorted(addresses.items())
        if len(hosts) > 1
    ]


def same_addresses(live: Sequence[Record], offline: Sequence[OfflineNode]) -> list[Finding]:
    """Find a live node and others, possibly lost for that reason, with the same IP address."""
    lost = [node.record for node in offline if not node.stopped]
    names: dict[tuple[str, int], dict[str, str]] = {}
    for record in (*live, *lost):
        for address in record.addresses[:1]:
            names.setdefault((address, record.peer_port), {})[record.node] = record.name
    found = []
    for (address, port), named in sorted(names.items()):
        # Daemons of one machine have different ports.
        if len(named) > 1 and any(record.addresses[:1] == (address,) for record in live):
            both = " and ".join(sorted(named.values(), key=natural))
            text = f"{both} have the same IP address and port, {address}:{port}"
            fix = (
                "if all of them are on, give each its own address: look for it in the router's DHCP leases "
                "and in each machine's network settings"
            )
            found.append(Finding(Grade.NOTICE, text, fix))
    return found


def offline_nodes(offline: Sequence[OfflineNode], *, alone: bool) -> list[Finding]:
    """Report the nodes that are offline. ``alone``: this node sees no other."""
    found = []
    lost = sorted((node.record.name for node in offline if not node.stopped), key=natural)
    if alone and len(lost) > 1:
        # All others are rarely gone at once, so do not suggest removing them one by one.
        names = ", ".join(lost)
        text = f"none of the other nodes responds ({names}): this machine is probably cut off from them"
        fix = "check its cable, Wi-Fi or VPN, its firewall and the switch; if these work, start the others"
        found.append(Finding(Grade.PROBLEM, text, fix))
        offline = [node for node in offline if node.stopped]
    for node in offline:
        name = node.record.name
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(node.since))
        if node.stopped:
            text, grade = f"{name} was stopped and has been offline since {since}", Grade.NOTICE
        else:
            text, grade = f"{name} has been offline since {since}: it does not answer", Grade.PROBLEM
        if node.held:
            models = ", ".join(sorted({layers.model for layers in node.held}))
            text += f"; it held {bytes_text(sum(layers.bytes for layers in node.held))} of {models}"
        text += ". Start it again, or remove it from the list:"
        found.append(Finding(grade, text, f"sollold forget {shlex.quote(name)}"))
    return found


def network(facts: Facts) -> list[Finding]:
    """Check how nodes find each other, and find duplicate, foreign and incompatible ones."""
    status = facts.network
    if status is None:
        return []
    return [
        *_discovery(status),
        *_unreached(facts),
        *_udp_blocked(facts, status),
        *_duplicates(facts, status),
        *_foreign(facts, status),
        *_unknown_fields(facts, status),
        *_incompatible(facts, status),
        *_rejected(status),
    ]


def _discovery(status: ClusterStatus) -> list[Finding]:
    found = []
    mdns = status.discovery
    if mdns is not None and not mdns.working:
        text = f"multicast DNS does not work ({mdns.reason}): only seeds and remembered addresses are tried"
        found.append(Finding(Grade.PROBLEM, text, _SEED))
    if status.unheard:
        text = (
            f"{', '.join(status.unheard)}: alive on this network, but never announced here by multicast "
            "DNS. It is switched off there, or a switch, a firewall or the Wi-Fi filters it; then new "
            "nodes do not find each other by themselves"
        )
        found.append(Finding(Grade.NOTICE, text, _SEED))
    return found


def _unreached(facts: Facts) -> list[Finding]:
    """Nodes that show they are alive, but take no connections, or this one itself."""
    ports = {record.node: (record.name, record.peer_port) for record in facts.live}
    found = []
    reasons: dict[str, list[str]] = {}
    for peer in facts.unreached:
        if peer.node not in ports:
            continue  # it has failed since the check
        name, port = ports[peer.node]
        if peer.large:
            found.append(Finding(Grade.PROBLEM, f"{name} {_LARGE_LOST}", _MTU))
        elif peer.inward:
            reasons.setdefault(peer.why, []).append(name)
        else:
            found.append(_blocked(f"{peer.why} from this node", name, port))
    for reason, names in reasons.items():
        others = ", ".join(sorted(names, key=natural))
        found.append(_blocked(f"{reason} from {others}", "this machine", facts.me.peer_port))
    return found


def _blocked(text: str, machine: str, port: int) -> Finding:
    return Finding(
        Grade.PROBLEM,
        f"{text} at port {port}/tcp, though it is alive: no models can be shared this way",
        f"let {port}/tcp and {port}/udp in through the firewall of {machine} (ufw: `sudo ufw allow sollold`)",
    )


def _udp_blocked(facts: Facts, status: ClusterStatus) -> list[Finding]:
    """Nodes that only TCP reaches."""
    names = sorted(status.unanswered, key=natural)
    if not names:
        return []
    ports = {record.name: record.peer_port for record in facts.live}
    all_nodes = len(names) > 1 and len(names) == len(facts.live) - 1
    machines: dict[int, list[str]] = {}
    for name in () if all_nodes else names:
        machines.setdefault(ports.get(name, facts.me.peer_port), []).append(name)
    machines.setdefault(facts.me.peer_port, []).append("this machine")
    lost = " or ".join(f"{port}/udp" for port in sorted({ports[name] for name in names if name in ports}))
    text = (
        f"{', '.join(names)}: datagrams to port {lost}, or the answers to them, get lost, and only "
        "connections get through: nodes know up to half a minute later what changes"
    )
    fixes = []
    for port, owners in sorted(machines.items()):
        owner = ", ".join(owners).replace(", this machine", " and of this machine")
        fixes.append(f"let {port}/udp in through the firewall of {owner}")
    return [Finding(Grade.PROBLEM, text, "; ".join(fixes))]


def _duplicates(facts: Facts, status: ClusterStatus) -> list[Finding]:
    """Find machines with the same node id: a state folder was copied."""
    found = []
    names = {record.node: record.name for record in facts.live}
    for double in status.doubles:
        if double.node != facts.me.node:
            name = names.get(double.node, double.node)
            text = (
                f"two machines use the node id of {name}{double.machines}. "
                "The state folder of one is a copy of the other's"
            )
            fix = (
                "on one of the two: delete the file node-key in its state folder, then "
                "`sudo systemctl restart sollold`"
            )
            found.append(Finding(Grade.PROBLEM, text, fix))
    if status.cloned:
        machines = "".join(d.machines for d in status.doubles if d.node == facts.me.node)
        text = (
            f"another machine uses the same node id{machines}. "
            "The state folder of one is a copy of the other's, so they can't find each other"
        )
        file = shlex.quote(facts.id_file)
        fix = f"on one of the two: `sudo rm {file}`, then on both: `sudo systemctl restart sollold`"
        found.append(Finding(Grade.PROBLEM, text, fix))
    return found


def _foreign(facts: Facts, status: ClusterStatus) -> list[Finding]:
    """Find nodes of another cluster."""
    mdns = status.discovery
    # A machine that waits to join a cluster needs advice on joining, not on merging two clusters.
    if mdns is None or not mdns.foreign or facts.me.seeking:
        return []
    plural = mdns.foreign > 1
    text = (
        f"{mdns.foreign} node{'s' if plural else ''} of another cluster on this network: "
        f"{'they have' if plural else 'it has'} another secret"
    )
    fix = (
        "if they belong together, delete the file keyring in the state folder of those that are to join, "
        "and restart those; with cluster.token, set the same one on all (`sollold token --show` prints it), "
        "and restart them"
    )
    return [Finding(Grade.NOTICE, text, fix)]


def _unknown_fields(facts: Facts, status: ClusterStatus) -> list[Finding]:
    """Find nodes whose release sends record fields that this one does not understand."""
    found = []
    for record in facts.live:
        if fields := status.unread.get(record.node):
            text = (
                f"{record.name} runs sollold {record.release}, this node {facts.me.release}, which does not "
                f"understand all fields of its record ({', '.join(fields)}): nothing new is placed there"
            )
            found.append(Finding(Grade.PROBLEM, text, SAME_VERSION))
    return found


def _incompatible(facts: Facts, status: ClusterStatus) -> list[Finding]:
    """Find nodes whose release this one can't communicate with at all."""
    announced = status.discovery.unlike if status.discovery is not None else ()
    addresses = sorted({*announced, *status.formats}, key=natural)
    if not addresses:
        return []
    rest = f" and {len(addresses) - _MAX_ADDRESSES} more" if len(addresses) > _MAX_ADDRESSES else ""
    text = (
        f"{', '.join(addresses[:_MAX_ADDRESSES])}{rest}: the release there can't talk with this one's "
        f"({facts.me.release}), so the nodes do not find each other"
    )
    return [Finding(Grade.PROBLEM, text, SAME_VERSION)]


def _rejected(status: ClusterStatus) -> list[Finding]:
    refused = sum(status.disbelieved.values())
    if not refused:
        return []
    text = (
        f"{refused} statement{'s' if refused > 1 else ''} from members of the cluster refused since the "
        "start: not signed by the node they are about, or with values that no node has"
    )
    fix = f"{SAME_VERSION}; if it continues, `sollold cluster rotate`"
    return [Finding(Grade.NOTICE, text, fix)]


def membership(facts: Facts) -> list[Finding]:
    """Check who takes part in the cluster, who may use it, and who waits for admission."""
    found = []
    if len(facts.live) == 1 and not facts.offline and not facts.me.seeking:
        text = (
            "no other node found; on the others, check that sollold runs, that the secret is the same "
            "and that the firewall allows 11436/tcp, 11436/udp and 5353/udp"
        )
        found.append(Finding(Grade.NOTICE, text, f"to find one without mDNS, {_SEED}"))
    if facts.me.open:
        text = (
            "an open cluster: anyone on this LAN can join it, and then read prompts, write answers, fetch "
            "models and use its memory"
        )
        found.append(Finding(Grade.NOTICE, text, "sollold cluster secure"))
    if facts.outdated_door:
        text = (
            "the settings say that this cluster is open, but it was given a secret (sollold cluster secure), "
            "which takes precedence"
        )
        found.append(Finding(Grade.NOTICE, text, "remove cluster.door and cluster.token from sollold.toml"))
    if facts.me.seeking:
        text = f"this machine {facts.me.seeking}"
        found.append(
            Finding(Grade.PROBLEM, text, f"on a machine there: `sollold admit {shlex.quote(facts.me.name)}`")
        )
    for record in facts.live:
        for machine in record.waiting:
            text = f"{machine.name} waits at {record.name} for admission; it shows the code {machine.code}"
            found.append(
                Finding(Grade.NOTICE, text, f"if it is yours: `sollold admit {shlex.quote(machine.code)}`")
            )
    # Other nodes' doors are known to be open, but for how long only their clocks tell.
    if any(r.door_until for r in facts.live):
        text = "new machines on this LAN are admitted to the cluster"
        if facts.me.door_until > facts.now:
            # The record has the end of the minute in which the door closes.
            text += f" for another {max(1, int((facts.me.door_until - facts.now) // 60))} min"
        found.append(Finding(Grade.NOTICE, text, "to end that now: `sollold cluster close`"))
    if facts.open_api:
        text = (
            "open API: other machines on this network can use models and read the cluster's state without an "
            'API key (if that is intended, set http.auth = "open")'
        )
        found.append(Finding(Grade.NOTICE, text, "sollold key new NAME"))
    return found

"""Intervals, timeouts and limits of the gossip protocols. Times are in seconds unless stated otherwise."""

from __future__ import annotations

from math import ceil, log2, log10

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """Parameters of membership, records and elections.

    Attributes:
        probe_interval: time after which the target of an unacknowledged probe becomes suspect.
        probes: probes started per interval.
        probe_timeout: time without an ack after which other nodes are asked to probe.
        indirect_probes: number of nodes asked.
        suspicion_multiplier: minimum suspicion time, in probe intervals times log10(n).
        suspicion_max: maximum suspicion time, as a multiple of the minimum.
        confirmations: independent suspicions that reduce the time to the minimum.
        awareness_max: maximum factor by which a slow node stretches its timeouts.
        gossip_interval, gossip_fanout: news is sent to this many peers in each interval.
        retransmit_multiplier: each message is sent this number times ⌈log10(n + 1)⌉ times.
        push_pull_interval: time between periodic exchanges of full states; longer in big clusters.
        sync_interval: minimum time between exchanges because of differing digests; doubled while they differ.
        fetch_interval: minimum time between exchanges with peers known to have newer data.
        reconnect_interval: one dead peer is tried per interval.
        forget_after: time after which a dead or left node is forgotten.
        quick_probe, quick_suspicion: after a broken connection: ping timeout, and duration of the suspicion
            that follows.
        silent_probe, silent_suspicion: the same after a connection was closed because it fell silent.
        lag: a tick later than this means that the process was stopped; its timeouts are moved back.
        introduce_timeout: time without an ack after which an introduced address is tried over TCP.
        retry_min, retry_max: pauses between attempts of a kept introduction.
        settle: time to wait after the leadership became vacant, so that views agree on each node's rank.
        patience: additional wait per rank.
        grace: time for which a newly started node waits for introductions before it claims a term.
        record_wait: time for which the record of a live leader may be missing before the leader is given up.
    """

    probe_interval: float = 1.0
    probes: int = 2
    probe_timeout: float = 0.5
    indirect_probes: int = 3
    suspicion_multiplier: float = 3.0
    suspicion_max: float = 6.0
    confirmations: int = 2
    awareness_max: int = 8
    gossip_interval: float = 0.2
    gossip_fanout: int = 3
    retransmit_multiplier: int = 4
    push_pull_interval: float = 30.0
    sync_interval: float = 3.0
    fetch_interval: float = 0.5
    reconnect_interval: float = 5.0
    forget_after: float = 86400.0
    quick_probe: float = 0.25
    quick_suspicion: float = 0.3
    silent_probe: float = 0.5
    silent_suspicion: float = 0.7
    lag: float = 1.0
    introduce_timeout: float = 1.0
    retry_min: float = 1.0
    retry_max: float = 30.0
    settle: float = 0.5
    patience: float = 1.0
    grace: float = 2.5
    record_wait: float = 3.0

    def retransmits(self, nodes: int) -> int:
        """Return how often each message is sent in a cluster of ``nodes``."""
        return self.retransmit_multiplier * ceil(log10(nodes + 1))

    def suspicion_min(self, nodes: int) -> float:
        """Return the minimum time that a suspect has to refute in a cluster of ``nodes``."""
        return self.suspicion_multiplier * max(1.0, log10(max(1, nodes))) * self.probe_interval

    def push_pull_every(self, nodes: int) -> float:
        """Return the seconds between periodic exchanges: one more interval per doubling beyond 32 nodes."""
        if nodes <= 32:
            return self.push_pull_interval
        return self.push_pull_interval * (ceil(log2(nodes) - log2(32)) + 1)


LAN = Tuning()
"""The LAN defaults of memberlist, with two exceptions. Two probes start per interval: in small clusters most
of the time until a death is known passes before any node probes the dead one. The suspicion multiplier is 3
instead of 4: nodes that learn of a suspect probe it next, so confirmations and refutations come sooner."""

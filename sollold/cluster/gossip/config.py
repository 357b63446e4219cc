"""Times and counts of the gossip protocols. Seconds where not said otherwise."""

from __future__ import annotations

from math import ceil, log2, log10

from sollold.facts import dataclass


@dataclass(frozen=True, slots=True)
class Tuning:
    """How eager membership, records and election are.

    Attributes:
        probe_interval: after it a probe without an ack makes its target a suspect.
        probes: peers whose probe begins in each interval.
        probe_timeout: after it without an ack others are asked to try.
        indirect_probes: how many others.
        suspicion_multiplier: least suspicion, in probe intervals times log10(n).
        suspicion_max: most suspicion, as a multiple of the least.
        confirmations: independent suspicions that bring the time down to the least.
        awareness_max: how far a slow node's time-outs stretch.
        gossip_interval, gossip_fanout: news go to that many peers in each interval.
        retransmit_multiplier: each piece of news is sent this often times ⌈log10(n + 1)⌉.
        push_pull_interval: whole states are exchanged with somebody; longer in big clusters.
        sync_interval: least time between exchanges because digests differ; doubled while they still do.
        fetch_interval: least time between exchanges because a peer is known to know more.
        reconnect_interval: one dead peer is tried in each.
        forget_after: a dead or left node is forgotten.
        quick_probe, quick_suspicion: after a broken link: how long a ping may take, and how long the
            suspicion lasts that follows.
        silent_probe, silent_suspicion: the same after a link that fell silent and was given up.
        lag: a tick later than this means that this process was stopped; its time-outs are moved on.
        introduce_timeout: after it without an ack an introduced address is tried over TCP.
        retry_min, retry_max: pauses between tries of a kept introduction.
        settle: an empty leadership is left so for this long, so that views agree who is first in line.
        patience: each further one in the line waits this much longer.
        grace: a node that just started waits for introductions before it claims.
        record_wait: how long the record of a live leader may be missing before it is given up.
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
        """How often each piece of news is sent in a cluster of ``nodes``."""
        return self.retransmit_multiplier * ceil(log10(nodes + 1))

    def suspicion_min(self, nodes: int) -> float:
        """Least time that a suspect has to refute in a cluster of ``nodes``."""
        return self.suspicion_multiplier * max(1.0, log10(max(1, nodes))) * self.probe_interval

    def push_pull_every(self, nodes: int) -> float:
        """Seconds between exchanges of whole states: longer by the interval with each doubling past 32."""
        if nodes <= 32:
            return self.push_pull_interval
        return self.push_pull_interval * (ceil(log2(nodes) - log2(32)) + 1)


LAN = Tuning()
"""The LAN defaults of memberlist, but for two. Two probes begin in an interval: in small clusters most of
the time until a death is known passes before anybody probes the dead. And suspicion is 3 instead of 4,
since nodes that hear of a suspect probe it next, so that confirmations and refutations come sooner."""

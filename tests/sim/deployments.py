"""Deployments in the simulated cluster: real ledgers with simplified leaders and heads.

Each machine has its own memory and worker processes, which outlive their daemon as real ones do. The checks
therefore do not depend on the ledger's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sollold.agent.ledger import Action, GrantsChanged, KillWorker, Ledger, PersistTerm
from sollold.agent.memory_room import MeasuredMemory
from sollold.cluster.gossip.record import Backend, Endpoint, State
from sollold.cluster.gossip.term import Term
from sollold.engines.commands import Commit, Done, Release, Renew, Reserve, Reserved
from sollold.machine.device import Device, Kind

from .world import Machine, Process, World

TTL = 6.0
"""Seconds a reservation or grant is valid; short, so that they expire during pauses of a schedule."""
MEMORY = 1000
DEVICE = "CUDA0"
_MODELS = ("a", "b", "c")
_RENEW = 1.5


class InvariantError(AssertionError):
    """An invariant is violated."""


@dataclass(frozen=True, slots=True)
class Deploy:
    """A command of the leader to a head, with the parts of a plan that the simulation needs."""

    term: Term
    deployment: str
    owners: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unload:
    """A command of the leader to a head."""

    term: Term
    deployment: str


@dataclass(slots=True)
class Disk:
    """The saved state of a machine's agent, and its worker processes."""

    term: Term = field(default_factory=Term)
    workers: dict[str, int] = field(default_factory=dict)
    obeyed: Term = field(default_factory=Term)
    """The newest term of any executed command; only for the check."""


@dataclass(slots=True)
class _Headed:
    owners: tuple[str, ...]
    heard: dict[str, float]
    ready: bool = False


class Agent:
    """The rest of a daemon besides the gossip: owner, head and, if elected, leader."""

    def __init__(self, cluster: Deployments, process: Process) -> None:
        self.cluster = cluster
        self.process = process
        self.world = process.world
        self.node = process.machine.node
        self.disk = cluster.disks[self.node]
        self.headed: dict[str, _Headed] = {}
        self.ledger = Ledger(term=self.disk.term, reservation_seconds=TTL, grant_seconds=TTL)
        self._placing: set[str] = set()
        self._measure()
        # Like the daemon: it first ends the workers of an earlier run, then grants memory.
        process.later(0.2 + self.world.random.random(), self._reconcile)
        process.later(1.0, self._tick)

    # The owner

    def _measure(self) -> None:
        used = sum(self.disk.workers.values())
        device = Device(DEVICE, Kind.GPU, "", MEMORY, MEMORY - used, MEMORY, 0, 0)
        allocated = {deployment: {DEVICE: size} for deployment, size in self.disk.workers.items()}
        self.ledger.measured(MeasuredMemory((device,), allocated))

    def _reconcile(self) -> None:
        self.disk.workers.clear()
        self._measure()
        self._apply(self.ledger.reconciled())

    def _apply(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, PersistTerm):
                self.disk.term = action.term
            elif isinstance(action, KillWorker):
                self.process.later(0.1 + self.world.random.random(), self._killed, action.deployment)
            elif isinstance(action, GrantsChanged):
                self.cluster.check(self)
        if actions:
            self._publish()

    def _killed(self, deployment: str) -> None:
        self.disk.workers.pop(deployment, None)
        self.headed.pop(deployment, None)
        self._measure()
        self._apply(self.ledger.ended(deployment))

    def _publish(self) -> None:
        gossip = self.process.gossip
        endpoints = tuple(
            Endpoint(
                deployment,
                deployment.split("-")[0],
                "",
                Backend.SHARDED,
                State.READY if headed.ready else State.LOADING,
            )
            for deployment, headed in sorted(self.headed.items())
        )
        record = replace(gossip.known.me, grants=self.ledger.grants(), endpoints=endpoints)
        self.process.apply(gossip.update_record(record, self.process.clock()))

    def _note_term(self, term: Term) -> None:
        if term < self.disk.obeyed:
            raise InvariantError(f"{self.process.machine.name} obeyed {term} after {self.disk.obeyed}")
        self.disk.obeyed = term

    def answer(self, caller: str, command: Any) -> Done | Reserved:
        """Execute a command; return the response."""
        now = self.process.clock()
        ledger = self.ledger
        if isinstance(command, Reserve):
            reserved, actions = ledger.reserve(command, now)
            if reserved.ok:
                self._note_term(command.term)
            self._apply(actions)
            return reserved
        if isinstance(command, Commit):
            done, actions = ledger.commit(command, now)
            self._apply(actions)
            if done.ok:
                self.disk.workers[command.deployment] = ledger.bytes_of(command.deployment)[DEVICE]
                self.cluster.check(self)
                self._measure()
            return done
        if isinstance(command, Renew):
            done, actions = ledger.renew(command, now)
            self._apply(actions)
            return done
        if isinstance(command, Release):
            own = any(g.deployment == command.deployment and g.head == caller for g in ledger.grants())
            done, actions = ledger.release(command, caller, now)
            if done.ok and not own:
                self._note_term(command.term)
            self._apply(actions)
            return done
        refusal, actions = ledger.see(command.term)
        self._apply(actions)
        if refusal:
            return Done(False, refusal)
        self._note_term(command.term)
        if isinstance(command, Deploy):
            self._deploy(command)
        elif command.deployment in self.headed:
            self._end(command.deployment, "unloaded")
        return Done(True)

    # The head

    def _deploy(self, command: Deploy) -> None:
        if command.deployment in self.headed:
            return
        now = self.process.clock()
        headed = self.headed[command.deployment] = _Headed(command.owners, dict.fromkeys(command.owners, now))
        waiting = set(command.owners)
        self._publish()

        def committed(owner: str) -> Callable[[Any, bool], None]:
            def done(reply: Any, ok: bool) -> None:
                if self.headed.get(command.deployment) is not headed:
                    return
                if not ok or not reply.ok:
                    self._end(command.deployment, f"{self.world.name(owner)} did not commit")
                    return
                waiting.discard(owner)
                if not waiting:
                    headed.ready = True
                    self.world.log(f"  {self.process.machine.name}: {command.deployment} is ready")
                    self._publish()

            return done

        for owner in command.owners:
            self.call(owner, Commit(command.deployment, self.node, (DEVICE,), ""), committed(owner))
        self.process.later(_RENEW, self._renew, command.deployment, headed)

    def _renew(self, deployment: str, headed: _Headed) -> None:
        if self.headed.get(deployment) is not headed:
            return
        now = self.process.clock()
        silent = [owner for owner in headed.owners if now - headed.heard[owner] > TTL]
        if silent:
            self._end(deployment, f"{self.world.name(silent[0])} is silent")
            return

        def renewed(owner: str) -> Callable[[Any, bool], None]:
            def done(reply: Any, ok: bool) -> None:
                if ok and self.headed.get(deployment) is headed:
                    if reply.ok:
                        headed.heard[owner] = self.process.clock()
                    elif headed.ready:
                        self._end(deployment, f"{self.world.name(owner)} has ended it")

            return done

        for owner in headed.owners:
            self.call(owner, Renew(deployment, self.node), renewed(owner))
        self.process.later(_RENEW, self._renew, deployment, headed)

    def _end(self, deployment: str, reason: str) -> None:
        headed = self.headed.pop(deployment)
        self.world.log(f"  {self.process.machine.name}: {deployment} ends: {reason}")
        for owner in headed.owners:
            self.call(owner, Release(self.ledger.term, deployment, self.node), _ignore_reply)
        self._publish()

    # The leader

    def _tick(self) -> None:
        self.process.later(1.0, self._tick)
        self._apply(self.ledger.expire(self.process.clock()))
        term = self.process.gossip.known.leader()
        if term.leader != self.node or self.cluster.frozen:
            return
        running: dict[str, list[tuple[str, str]]] = {model: [] for model in _MODELS}
        for record in self.process.gossip.known.live():
            for endpoint in record.endpoints:
                running[endpoint.model].append((endpoint.id, record.node))
        for model, endpoints in running.items():
            if not endpoints and model not in self._placing:
                self._place(model, term)
            elif len(endpoints) > 1 or (endpoints and self.world.random.random() < 0.05):
                deployment, head = max(endpoints)
                self.call(head, Unload(term, deployment), _ignore_reply)

    def _place(self, model: str, term: Term) -> None:
        random = self.world.random
        nodes = [record.node for record in self.process.gossip.known.live()]
        owners = tuple(sorted(random.sample(nodes, min(len(nodes), random.randint(1, 3)))))
        head = random.choice(owners)
        size = random.randint(200, 600)
        deployment = f"{model}-{self.cluster.next_number()}"
        self._placing.add(model)
        self.world.log(
            f"  {self.process.machine.name}: places {deployment} on {[self.world.name(o) for o in owners]}"
        )

        def reserve(index: int) -> None:
            if index == len(owners):
                self.call(head, Deploy(term, deployment, owners), finished)
                return

            def reserved(reply: Any, ok: bool) -> None:
                if ok and reply.ok:
                    reserve(index + 1)
                    return
                for owner in owners[: index + 1]:
                    self.call(owner, Release(term, deployment, head), _ignore_reply)
                finished(None, False)

            self.call(owners[index], Reserve(term, deployment, head, {DEVICE: size}), reserved)

        def finished(reply: Any, ok: bool) -> None:
            self._placing.discard(model)

        reserve(0)

    # Calls

    def call(self, node: str, command: Any, then: Callable[[Any, bool], None]) -> None:
        """A peer call; sometimes it arrives twice."""
        if node == self.node:
            then(self.answer(node, command), True)
            return
        addresses = self.process.gossip.known.addresses(node)
        if not addresses:
            then(None, False)
            return

        def answer(process: Process, body: Any) -> Any:
            agent = self.cluster.agents[process]
            if agent.node != node:
                # Like TLS: the address may belong to another machine now, or to this one.
                return _WRONG_NODE
            if self.world.random.random() < 0.1:
                process.later(self.world.random.random() * 10, agent.answer, self.node, body)
            return agent.answer(self.node, body)

        def check(reply: Any, ok: bool) -> None:
            if self.process.alive:
                then(None if reply is _WRONG_NODE else reply, ok and reply is not _WRONG_NODE)

        self.world.call(self.process, addresses[0], command, answer, check)


_WRONG_NODE = object()
"""The response of a node that was not called."""


def _ignore_reply(reply: Any, ok: bool) -> None:
    pass


class Deployments:
    """The agents of a world, and their invariants."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.frozen = False
        """Leaders no longer place and unload."""
        self.disks = {machine.node: Disk() for machine in world.machines}
        self.agents: dict[Process, Agent] = {}
        self.ready = 0
        self._last = 0
        world.started = self._started
        world.ended = self._ended

    def _started(self, process: Process) -> None:
        self.agents[process] = Agent(self, process)

    def _ended(self, process: Process) -> None:
        del self.agents[process]

    def lose_disk(self, machine: Machine) -> None:
        """Lose the saved term, also for the check; worker processes stay."""
        disk = self.disks[machine.node]
        disk.term = disk.obeyed = Term()

    def next_number(self) -> int:
        self._last += 1
        return self._last

    def check(self, agent: Agent) -> None:
        """Check that neither the grants nor the workers exceed the machine's memory."""
        granted = sum(grant.bytes for grant in agent.ledger.grants())
        used = sum(agent.disk.workers.values())
        if granted > MEMORY or used > MEMORY:
            raise InvariantError(f"{agent.process.machine.name} granted {granted}, uses {used} of {MEMORY}")

    def inconsistency(self) -> str:
        """Return a grant or worker without its head, or a head without a grant; or an empty string."""
        by_node = {agent.node: agent for agent in self.agents.values()}
        for agent in self.agents.values():
            name = agent.process.machine.name
            for grant in agent.ledger.grants():
                head = by_node.get(grant.head)
                if head is None or grant.deployment not in head.headed:
                    return f"{name} holds a grant of {grant.deployment} without a head"
            for deployment, headed in agent.headed.items():
                for owner in headed.owners:
                    if owner not in by_node or not by_node[owner].ledger.holds(deployment):
                        return f"{name} heads {deployment} without a grant of {self.world.name(owner)}"
            for deployment in agent.disk.workers:
                if not agent.ledger.holds(deployment):
                    return f"a worker of {deployment} runs on {name} without a grant"
        return ""

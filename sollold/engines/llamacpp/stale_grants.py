"""Releases grants that an earlier run of this daemon, as a head, has left on other nodes.

A daemon that is killed and restarted within a second never looks dead: no other node can know that its grants
will not be renewed before they expire, and until then that memory is unavailable.
"""

from __future__ import annotations

import asyncio
import logging

from sollold.bounded import BoundedDict
from sollold.cluster.gossip.record import GrantState
from sollold.cluster.net.rpc import PeerError
from sollold.cluster.net.rpc_client import RpcClient
from sollold.cluster.net.view import View, name_of
from sollold.engines.commands import Done, Release
from sollold.tasks import cancel_and_wait, start_task

log = logging.getLogger("sollold.engines")

_TIMEOUT = 15.0
_MAX_DEPLOYMENTS = 512


class StaleGrants:
    """Releases stale grants as they appear in the records. Call `close` at the end."""

    def __init__(self, view: View, calls: RpcClient) -> None:
        self._view = view
        self._calls = calls
        self._own: BoundedDict[str, None] = BoundedDict(_MAX_DEPLOYMENTS)
        self._asked: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def register_own(self, deployment: str) -> None:
        """Record that this run is the head of ``deployment`` and releases its grants itself.

        Beyond `_MAX_DEPLOYMENTS` the ones whose grants were last seen the longest ago are forgotten.
        """
        self._own[deployment] = None

    def release_stale(self) -> None:
        """Release the grants of deployments unknown to this head. Called when the records change."""
        me = self._view.me.node
        # Only a head commits: a mere reservation may belong to a plan that is on its way to us.
        committed = {
            (record.node, grant.deployment)
            for record in self._view.live()
            for grant in record.grants
            if grant.head == me and record.node != me and grant.state is GrantState.COMMITTED
        }
        stale = set()
        for node, deployment in committed:
            if deployment in self._own:
                self._own[deployment] = None
            else:
                stale.add((node, deployment))
        for node, deployment in sorted(stale - self._asked):
            start_task(self._tasks, self._give_back(node, deployment), f"stale grant {deployment}")
        self._asked = stale

    async def close(self) -> None:
        """Stop releasing; the remaining grants expire."""
        await cancel_and_wait(*self._tasks)

    async def _give_back(self, node: str, deployment: str) -> None:
        request = Release(self._view.leader(), deployment, self._view.me.node)
        try:
            await self._calls.call(node, "release", request, Done, timeout=_TIMEOUT)
        except PeerError as error:
            log.info("%s still holds memory for an earlier run: %s", name_of(self._view, node), error)
            return
        log.info(
            "%s released what an earlier run of this daemon held there",
            name_of(self._view, node),
            extra={"deployment": deployment},
        )

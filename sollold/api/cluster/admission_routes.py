"""``/api/cluster/admit``, ``door``, ``rotate`` …: admission to the cluster, and its members.

Changes need full rights: those of local programs, members, and keys with the scope ``admin``. Invitation
codes never leave this machine, since the API may be unencrypted.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
from aiohttp import web

from sollold.api.http.access import client_of
from sollold.api.http.body import as_type, read_object
from sollold.api.http.response import json_response
from sollold.api.http.route import Route
from sollold.cluster.admission.keyring import MAX_MEMBERS, NodeId
from sollold.control.admission import AdmissionService
from sollold.control.secret_change import Rolled


class AdmitBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/admit``. ``machine``: the name, id or code of a waiting machine."""

    machine: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class DoorBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/door``. ``seconds``: how long to admit every machine that asks; 0 stops that."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)]


class EvictBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/evict``. ``machine``: the name or id of a member."""

    machine: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class SecureBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/secure``. ``nodes``: ids of the nodes that receive the secret."""

    nodes: Annotated[list[NodeId], msgspec.Meta(min_length=1, max_length=MAX_MEMBERS)]


class JoinBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/join``. ``code``: of an invitation; ``seed``: ``host[:port]`` of the inviter."""

    code: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    seed: Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class AdmissionRoutes:
    """The handlers of the admission endpoints."""

    def __init__(self, admission: AdmissionService) -> None:
        self._admission = admission

    def routes(self) -> list[Route]:
        """Return the route table."""
        get, post = partial(Route, "GET"), partial(Route, "POST")
        return [
            post("/api/cluster/admit", self._admit, "Admit a waiting machine", AdmitBody),
            post("/api/cluster/door", self._door, "Admit new machines for a while", DoorBody),
            get("/api/cluster/members", self._members, "The cluster's members: present, away or evicted"),
            get(
                "/api/cluster/ca",
                self._authority,
                'The certificate authority of nodes with `http.tls = "cluster"`, in PEM',
            ),
            post("/api/cluster/rotate", self._rotate, "Give all members a new secret"),
            post(
                "/api/cluster/evict",
                self._evict,
                "Evict a member, and give the others a new secret",
                EvictBody,
            ),
            post("/api/cluster/secure", self._secure, "Give an open cluster a secret", SecureBody),
            post(
                "/api/cluster/invite",
                self._invite,
                "Create a code with which one machine may join at this node (from this machine only)",
            ),
            post(
                "/api/cluster/join",
                self._join,
                "Join a cluster with an invitation code (from this machine only)",
                JoinBody,
            ),
        ]

    async def _admit(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), AdmitBody)
        admitted = await self._admission.admit(body.machine)
        return json_response(msgspec.to_builtins(admitted))

    async def _door(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), DoorBody)
        return json_response({"nodes": await self._admission.open_door(body.seconds)})

    async def _members(self, request: web.Request) -> web.Response:
        return json_response({"members": self._admission.secret.members()})

    async def _authority(self, request: web.Request) -> web.Response:
        return web.Response(text=self._admission.authority(), content_type="application/x-pem-file")

    async def _rotate(self, request: web.Request) -> web.Response:
        return _result(await self._admission.secret.rotate())

    async def _evict(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), EvictBody)
        member, rolled = await self._admission.secret.evict(body.machine)
        return _result(rolled, node=member.node, name=member.name)

    async def _secure(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), SecureBody)
        return _result(await self._admission.secret.secure(body.nodes))

    async def _invite(self, request: web.Request) -> web.Response:
        self._check_local(request)
        return json_response(msgspec.to_builtins(self._admission.invite()))

    async def _join(self, request: web.Request) -> web.Response:
        self._check_local(request)
        body = as_type(await read_object(request), JoinBody)
        return json_response({"name": await self._admission.join(body.code, body.seed)})

    def _check_local(self, request: web.Request) -> None:
        """Refuse callers on other machines, since an eavesdropper would learn the code."""
        if not client_of(request).local:
            raise web.HTTPForbidden(
                text="invitation codes can only be created and used on the machine itself"
            )


def _result(rolled: Rolled, **fields: str) -> web.Response:
    """Return the result of changing the secret."""
    names = {key: [member.name for member in getattr(rolled, key)] for key in ("done", "away", "unsure")}
    return json_response({**fields, "generation": rolled.generation, **names})

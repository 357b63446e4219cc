"""``/api/cluster/keys``: API keys; ``/api/cluster/pass``: passes to other members for local programs."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
from aiohttp import web

from sollold.api.http.access import ACCESS, client_of
from sollold.api.http.body import as_type, read_object
from sollold.api.http.response import json_response
from sollold.api.http.route import Route
from sollold.api.http.services import AppServices
from sollold.control.keys import Key, Keys, Scope
from sollold.control.member_pass import PASS_SECONDS
from sollold.errors import Fault, Refusal, bad_request
from sollold.units import parse_seconds, timestamp_text

_MAX_SECONDS = 100 * 366 * 86400.0
"""Maximum lifetime of a key, in seconds."""


class NewKeyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/keys``. ``expires``: seconds from now, or a duration (``12h``, ``30d``)."""

    name: str = ""
    scope: Scope = Scope.INFER
    expires: float | str | None = None

    def seconds(self) -> float:
        """Return the key's lifetime in seconds; 0.0 for no expiry.

        Raises:
            Refusal: BAD_REQUEST.
        """
        if self.expires is None:
            return 0.0
        try:
            seconds = parse_seconds(str(self.expires))
        except ValueError as error:
            raise bad_request(f"invalid expires: {error}") from None
        if not 0 < seconds <= _MAX_SECONDS:
            raise bad_request("invalid expires: it must be positive and at most 100 years")
        return seconds


class KeyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``DELETE /api/cluster/keys``. ``name``: the key's name or id."""

    name: str = ""


class PassBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``POST /api/cluster/pass``. ``host``: name or address of the member that the pass is for."""

    host: Annotated[str, msgspec.Meta(min_length=1, max_length=300)]


class KeyRoutes:
    """The handlers of keys and passes."""

    def __init__(self, services: AppServices) -> None:
        self._services = services

    def routes(self) -> list[Route]:
        """Return the route table."""
        path = "/api/cluster/keys"
        get, post = partial(Route, "GET"), partial(Route, "POST")
        return [
            get(path, self._listed, "The API keys, without their secrets"),
            post(path, self._create, "Create an API key; its secret is shown only once", NewKeyBody),
            Route("DELETE", path, self._revoke, "Revoke an API key", KeyBody),
            post(
                "/api/cluster/pass",
                self._issue,
                "Create a pass with which this machine's programs may call another member",
                PassBody,
            ),
        ]

    async def _listed(self, request: web.Request) -> web.Response:
        keys = [key_object(key) for key in self._keys.all()]
        return json_response({"open": request.app[ACCESS].open, "keys": keys})

    async def _create(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), NewKeyBody)
        key, secret = await self._keys.create(body.name, body.scope, body.seconds())
        return json_response({"key": secret, **key_object(key)})

    async def _revoke(self, request: web.Request) -> web.Response:
        body = as_type(await read_object(request), KeyBody)
        return json_response(key_object(await self._keys.revoke(body.name)))

    async def _issue(self, request: web.Request) -> web.Response:
        """``POST /api/cluster/pass``: only for programs of this machine, also if the caller has a key."""
        passes = self._services.passes
        if passes is None:
            raise Refusal(Fault.ENGINE, "this node does not issue passes", status=501)
        if not client_of(request).local:
            raise bad_request("passes are issued only to programs of this machine", status=403)
        body = as_type(await read_object(request), PassBody)
        issued = await passes.issue(body.host)
        return json_response({"pass": issued, "seconds": PASS_SECONDS, "authority": passes.authority()})

    @property
    def _keys(self) -> Keys:
        if self._services.keys is None:
            raise Refusal(Fault.ENGINE, "this node stores no API keys", status=501)
        return self._services.keys


def key_object(key: Key) -> dict[str, Any]:
    """Return a key as JSON; times are strings, null if unset."""

    def time_text(seconds: float) -> str | None:
        return timestamp_text(seconds) if seconds else None

    return {
        "id": key.id,
        "name": key.name,
        "scope": str(key.scope),
        "created": time_text(key.created),
        "expires": time_text(key.expires),
        "revoked": time_text(key.revoked),
    }

"""Access control for HTTP: callers on this machine, members of the cluster, keys, and all other callers."""

from __future__ import annotations

import hashlib

import msgspec
from aiohttp import web

from sollold.api.http.client_address import ClientAddress, Network, address_of
from sollold.api.http.exchange import Exchange, exchange_of
from sollold.control.keys import PREFIX as KEY_PREFIX
from sollold.control.keys import Key, Keys, Scope
from sollold.control.member_pass import PREFIX as PASS_PREFIX
from sollold.control.member_pass import MemberPasses
from sollold.errors import bad_request

PUBLIC = frozenset({"/", "/health", "/ready", "/openapi.json", "/web/{file}"})
"""Routes that need no key: they reveal nothing of models or people, and browsers load pages without a key."""
INFERENCE = frozenset(
    {
        "/api/chat",
        "/api/generate",
        "/api/embed",
        "/api/embeddings",
        "/api/show",
        "/api/batch/embed",
        "/api/batch/jobs/{id}",
        "/api/cluster/plan",
        "/api/cluster/route",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/responses",
        "/v1/responses/compact",
        "/v1/responses/input_tokens",
        "/v1/responses/{id}",
        "/v1/responses/{id}/cancel",
        "/api/me",
        "/api/signout",
        "/v1/rerank",
        "/rerank",
        "/tokenize",
        "/detokenize",
        "/infill",
        "/apply-template",
    }
)
"""Routes that run a model, or read without GET. Only owners may use their batches and stored responses."""
MODELS = frozenset(
    {
        "/api/pull",
        "/api/push",
        "/api/create",
        "/api/copy",
        "/api/delete",
        "/api/blobs/{digest}",
        "/api/cluster/load",
        "/api/cluster/unload",
    }
)
SECRET = frozenset({"/api/cluster/keys", "/api/cluster/logs/{model}"})
"""Routes to which GET does not give access either."""


class Client(msgspec.Struct, frozen=True):
    """The sender of a request.

    Attributes:
        address: the machine's address, as far as it can be known.
        scope: what the client may do; None: nothing without a key.
        key: the valid key that it presented.
        local: it is a program on this machine.
        member: it presented the pass of a member of the cluster.
    """

    address: str
    scope: Scope | None
    key: Key | None = None
    local: bool = False
    member: bool = False

    @property
    def identity(self) -> str:
        """Identity for fair queueing: the key, else the address."""
        return f"key:{self.key.id}" if self.key is not None else self.address

    def may(self, needed: Scope) -> bool:
        """Whether it has the scope ``needed``."""
        return self.scope is not None and self.scope.includes(needed)

    @property
    def name(self) -> str:
        """Name for logs and metrics: the key's, else ``local``, ``member`` or empty."""
        if self.key is not None:
            return self.key.name
        return "local" if self.local else "member" if self.member else ""


class Access:
    """Decides who may do what. ``mode`` and ``proxies`` may be changed later.

    Attributes:
        mode: ``open``: all callers may use models and read; ``keys``: other machines need a key; empty: open
            until the first key is created.
        proxies: addresses and networks whose ``X-Forwarded-For`` is trusted.
    """

    def __init__(self, mode: str = "", keys: Keys | None = None, passes: MemberPasses | None = None) -> None:
        self.mode = mode
        self.proxies: tuple[Network, ...] = ()
        self._keys = keys
        self._passes = passes

    @property
    def open(self) -> bool:
        """Whether other machines may use models and read without a key."""
        return self.mode == "open" or (not self.mode and (self._keys is None or not self._keys.made))

    async def admit(self, request: web.Request, exchange: Exchange, peer: ClientAddress) -> None:
        """Note the client of ``request``, which comes from ``peer``, and check its scope.

        Raises:
            Refusal: BAD_REQUEST with status 401 if a key would help, 403 if the presented one does not
                suffice.
        """
        needed = scope_of(request.method, exchange.route)
        client = exchange.client = await self._identify(request, peer)
        if needed is None or (client is not None and client.may(needed)):
            return
        if client is None:
            raise bad_request("the API key is not valid: it is unknown, expired or revoked", status=401)
        if client.key is not None:
            message = f"the API key {client.key.name!r} has the scope {client.key.scope}; this needs {needed}"
            raise bad_request(message, status=403)
        problem, hint = _key_problem(request), _KEY_HINT.format(needed)
        action = "an API key is needed"
        if client.scope is not None:
            action = f"from another machine this needs an API key with the scope {needed}"
        raise bad_request(f"{action}{problem}; {hint}", status=401)

    def valid(self, key: Key) -> bool:
        """Whether a key that was presented is still valid."""
        return self._keys is not None and self._keys.valid(key)

    def may_follow(self, request: web.Request) -> bool:
        """Whether the reader of an endless stream may continue; `while_valid` watches those with a key."""
        client = client_of(request)
        if client.member:
            passes = self._passes
            return passes is not None and any(map(passes.from_live, _secrets(request)))
        return client.local or client.key is not None or self.open

    async def _identify(self, request: web.Request, peer: ClientAddress) -> Client | None:
        """Return the client that sent ``request``; None if its key is not valid."""
        secrets, key = _secrets(request), None
        for secret in secrets:
            passes = self._passes if secret.startswith(PASS_PREFIX) else None
            if passes is not None and await passes.check(secret):
                return Client(peer.address, Scope.ADMIN, local=peer.local, member=True)
            key = key or (self._keys.find(secret) if self._keys is not None else None)
        if peer.local:
            return Client(peer.address, Scope.ADMIN, key, local=True)
        if key is not None:
            return Client(peer.address, key.scope, key)
        if any(secret.startswith((KEY_PREFIX, PASS_PREFIX)) for secret in secrets):
            return None
        return Client(peer.address, Scope.INFER if self.open else None)


ACCESS = web.AppKey("access", Access)
"""The application's `Access`."""


def scope_of(method: str, route: str) -> Scope | None:
    """Return the scope that a request needs; None if it needs no key. Unlisted routes need `Scope.ADMIN`."""
    if route in PUBLIC or not route or method == "OPTIONS":
        return None
    if route in MODELS:
        return Scope.MODELS
    if route in INFERENCE or (method in ("GET", "HEAD") and route not in SECRET):
        return Scope.INFER
    return Scope.ADMIN


def client_of(request: web.Request) -> Client:
    """Return the client that sent ``request``."""
    client = exchange_of(request).client
    if client is None:
        peer = address_of(request, ())
        client = Client(peer.address, None, local=peer.local)
    return client


_KEY_HINT = "`sollold key new NAME --scope {}` on a node creates one"


def require(request: web.Request, needed: Scope, action: str) -> None:
    """Require a scope for an action beyond that of its route; ``action`` describes it for the message.

    Raises:
        Refusal: BAD_REQUEST with status 401 if a key would help, 403 if the presented one does not suffice.
    """
    client = client_of(request)
    if client.may(needed):
        return
    hint = _KEY_HINT.format(needed)
    message = f"{action} from another machine needs an API key with the scope {needed}; {hint}"
    raise bad_request(message, status=403 if client.key is not None else 401)


def holder_of(request: web.Request) -> str:
    """Return the owner of the stored data that ``request`` may read; empty if it has no key and no secret.

    A secret that is no key proves nothing, but only a client that knows it can have stored data under it.
    """
    client = client_of(request)
    if client.key is not None:
        return client.identity
    for secret in _secrets(request):
        return f"secret:{hashlib.sha256(secret.encode('utf-8', 'surrogateescape')).hexdigest()}"
    return ""


def _secrets(request: web.Request) -> list[str]:
    """Return the keys or passes in a request: a program may send another beside the one it was given."""
    found = []
    # A proxy with a login of its own may have added a second header.
    for header in request.headers.getall("Authorization", ()):
        words = header.split(None, 1)
        if len(words) == 2 and words[0].lower() == "bearer":
            found.append(words[1].strip())
    found += map(str.strip, request.headers.getall("X-Api-Key", ()))
    return list(filter(None, found))


def _key_problem(request: web.Request) -> str:
    """Return a phrase about a request's unusable key, to append to a message; empty if it has none."""
    if _secrets(request):
        return ", and the one that was sent is not known to this cluster"
    if request.headers.get("Authorization", "").strip():
        return ", sent as `Authorization: Bearer KEY` or `x-api-key: KEY`"
    return ""

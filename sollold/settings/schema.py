"""The settings, as facts. One class a section of ``sollold.toml``; every field has its default.

How they are read and checked, and where each value came from, is in `sollold.settings.load`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from msgspec import Meta

from sollold.facts import dataclass
from sollold.settings.location import HTTP_PORT

MIB = 1024 * 1024
GIB = 1024 * MIB

Bytes = Annotated[int, Meta(ge=0, le=2**62, title="bytes")]
"""Written as a number of bytes or with a unit: ``"20 GiB"``, ``"400 MB"``."""
Seconds = Annotated[float, Meta(title="seconds")]
"""Written as a number of seconds or with a unit: ``"5m"``, ``"1h30m"``."""
Limit = Annotated[float, Meta(ge=0, le=1e8, title="seconds")]
"""`Seconds` that somebody is made to wait at the most: never negative, never for ever."""
Token = Annotated[
    str,
    Meta(
        pattern=r"^\s*([0-9a-fA-F]{64}|open|)\s*$",
        description="64 hex digits, as `sollold token` makes them, or open",
    ),
]
SeedText = Annotated[
    str,
    Meta(
        pattern=r"^\s*(\[[0-9a-fA-F:.%\w]+\](:\d{1,5})?|[^\s:\[\]]+(:\d{1,5})?|[0-9a-fA-F:.%\w]+)\s*$",
        description="host, host:port or [IPv6]:port",
    ),
]
Door = Annotated[
    str,
    Meta(
        pattern=r"^\s*(open|closed|\d{1,9}(\.\d{1,9})?|(\d{1,9}(\.\d{1,9})?(s|m|h|d))+)\s*$",
        description="open, closed or a time such as 1h",
    ),
]
UrlText = Annotated[str, Meta(pattern=r"^(https?://\S+)?$", max_length=2000)]
ProxyText = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-fA-F.:]+(/\d{1,3})?$",
        title="network",
        description="an IP address or a network, as 10.0.0.0/8",
    ),
]
HostText = Annotated[
    str,
    Meta(
        pattern=r"^(\*|(\*\.)?[^\s:/*?#@\[\]]+|[0-9a-fA-F:.]*:[0-9a-fA-F:.]*)$",
        description="a name such as llm.example.com or *.example.com, without http:// and port",
    ),
]
OriginText = Annotated[
    str,
    Meta(
        pattern=r"^(\*|null|[a-zA-Z][a-zA-Z0-9+.-]*://(\*|[^\s/*?#@]+)/?)$",
        description="an origin such as https://chat.example.com, app://* or *",
    ),
]
Port = Annotated[int, Meta(ge=0, le=65535, title="port")]
"""0 takes a free one."""
Count = Annotated[int, Meta(ge=0, title="count")]
MOST_SLOTS = 64
"""Requests at a time that one deployment can be loaded for."""
Speculate = Annotated[
    str, Meta(min_length=1, max_length=300, description="auto, off, mtp, ngram or a model's name")
]
"""How tokens are drafted."""
KvType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """``[node]``: this machine."""

    name: str = ""
    """Name shown to users; empty: the host name."""
    state_dir: str = ""
    """Identity, journal, logs; empty: ``$STATE_DIRECTORY`` or ``~/.local/state/sollold``."""
    cache_dir: str = ""
    """llama.cpp, workers' tensors; empty: ``$CACHE_DIRECTORY`` or ``~/.cache/sollold``."""
    memory_limit: Bytes = 0
    """Most bytes that models may use over all devices; 0: limited by the devices only."""
    device_limits: dict[str, Bytes] = field(default_factory=dict)
    """Most bytes per device (``CUDA0 = "20 GiB"``)."""
    reserve: Bytes = 512 * MIB
    """Bytes of RAM kept free for the rest of the machine."""
    gpu_reserve: Bytes = 256 * MIB
    """Bytes of every GPU kept free for other programs."""
    devices: tuple[str, ...] = ()
    """Devices that may be used; empty: all GPUs and the CPU."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """``[http]``: the HTTP API."""

    host: str = "0.0.0.0"
    """Address to listen on; ``127.0.0.1`` keeps the API to this machine."""
    port: Port = HTTP_PORT
    """Where Ollama's, OpenAI's and Anthropic's clients and browsers connect."""
    cors_origins: tuple[OriginText, ...] = (
        "http://localhost",
        "https://localhost",
        "http://127.0.0.1",
        "https://127.0.0.1",
        "http://0.0.0.0",
        "https://0.0.0.0",
        "app://*",
        "file://*",
        "tauri://*",
        "vscode-webview://*",
        "vscode-file://*",
    )
    """Origins that may call the API from a browser or an Electron-like program (``app://*``: all of that
    scheme); ``"*"``: all. A node's own pages are always allowed."""
    hosts: tuple[HostText, ...] = ()
    """Names by which clients may address this node besides IP addresses, the nodes' names, localhost,
    *.local, *.lan, *.internal and *.home.arpa; ``*.example.com``: all below it; ``*``: any (no protection
    against DNS rebinding)."""
    auth: Literal["", "open", "keys"] = ""
    """Who needs an API key. ``open``: other machines may ask models and read without one; ``keys``: they need
    one for everything; empty: as ``open`` until the first key is made. Programs of this machine never need
    one; orders from other machines (load, delete, drain …) always do."""
    trusted_proxies: tuple[ProxyText, ...] = ()
    """Addresses or networks of reverse proxies whose ``X-Forwarded-For`` is believed (``10.0.0.0/8``)."""
    tls: Literal["off", "cluster", "own"] = "off"
    """HTTPS for other machines; those of this machine may use HTTP all the same. ``cluster``: with a
    certificate by the cluster's own authority, which ``sollold cluster ca`` prints; ``own``: with that of
    ``tls_certificate``; ``off``: HTTP alone."""
    tls_certificate: str = ""
    """For ``tls = "own"``: file with the certificate and those that issued it, in PEM. A renewed file is read
    by itself."""
    tls_key: str = ""
    """File with the certificate's key in PEM, without a password."""
    wait_limit: Limit = 600.0
    """Seconds that a request waits for a model to load before it fails with 503."""


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """``[cluster]``: which nodes belong together and how they find each other."""

    token: Token = ""
    """The cluster's secret, 64 hex digits; empty: as ``door`` says."""
    old_tokens: tuple[Token, ...] = ()
    """Older secrets still accepted while ``token`` is being changed."""
    door: Door = "1h"
    """Without a token: ``open``: anyone on the LAN can join, until ``sollold cluster secure``. A time such as
    ``1h``: the cluster has a random secret; new machines are admitted automatically for so long after its
    founding, and from then on by ``sollold admit``. ``closed``: only by that."""
    host: str = "::"
    """Address to listen on for other nodes; ``::``: all of both families, ``0.0.0.0``: of IPv4 alone."""
    port: Port = 11436
    """UDP for gossip, TCP (TLS) for everything else between nodes; best the same on all nodes."""
    seeds: tuple[SeedText, ...] = ()
    """``host:port`` of nodes to join without multicast."""
    mdns: bool = True
    """Find nodes by multicast DNS. Seeds and remembered peers work without it."""
    interfaces: tuple[str, ...] = ()
    """Network interfaces for mDNS; empty: chosen automatically, physical ones first."""


@dataclass(frozen=True, slots=True)
class LlamaSettings:
    """``[llama]``: where llama.cpp is found and how it runs."""

    server: str = ""
    """Path of ``llama-server``; empty: found, or built."""
    rpc_server: str = ""
    """Path of ``ggml-rpc-server``, of the same build."""
    build: bool = True
    """Build the pinned version when none is found."""
    jobs: Count = 0
    """Parallel compile jobs; 0: as many as cores and memory allow."""
    worker_port: Port = 50052
    """First port tried for workers, on loopback."""
    server_port: Port = 18080
    """First port tried for ``llama-server``, on loopback."""
    threads: Count = 0
    """Threads of each engine; 0: one per physical core."""
    worker_cache: bool = True
    """Workers cache tensors on disk, so that repeated loads are fast."""
    worker_cache_limit: Bytes = 64 * GIB
    """Size limit of that cache; least recently used tensors are removed first."""
    rpc_backends: tuple[str, ...] = ()
    """``host:port`` of external llama.cpp RPC workers; the variable RPC_BACKENDS sets it too."""
    allow_plain_workers: bool = False
    """Use external workers. They are neither authenticated nor encrypted: anyone on the network can read and
    change what they compute."""
    extra_args: tuple[str, ...] = ()
    """Added to every ``llama-server`` command line."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Properties of a model that no node has yet. All fields are optional."""

    parameters: Annotated[float, Meta(ge=0)] = 0.0
    """In billions."""
    memory: Bytes = 0
    """Memory that it needs with its context; 0: estimated from the parameters."""
    requires_distributed: bool = False
    """Spread it over machines even if it fits one."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """``[models]``: where models are."""

    folders: tuple[str, ...] = ()
    """Folders with GGUF files; read, never written."""
    ollama_stores: tuple[str, ...] = ()
    """Roots of Ollama stores; empty: where Ollama puts them. A managed Ollama uses the first."""
    huggingface: bool = True
    """Use models in the Hugging Face cache and in llama.cpp's older one."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Additional model names (``gpt-4o = "llama3.1:70b"``)."""
    profiles: dict[str, ModelProfile] = field(default_factory=dict)
    """Properties of models that no node has yet: [models.profiles."llama3.1:405b"] with parameters (in
    billions), memory and requires_distributed. Used for plans until the model's file is there."""
    download_dir: str = ""
    """Folder for downloaded models; empty: ``<state_dir>/models``. The service may write only to its own
    folders: to allow another one, set ``ReadWritePaths=`` with ``systemctl edit sollold``."""
    fetch_seconds: Limit = 300.0
    """Longest time the best machine for a model may take to copy its file from another node before loading;
    0: models run only where their files are, and nothing is copied automatically."""
    transfer_rate: Bytes = 0
    """Bytes per second for transfers between nodes; 0: no limit."""


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """``[placement]``: how layers are placed."""

    policy: Literal["fastest", "memory_aware", "even", "spread"] = "fastest"
    """``fastest``: least time per token; ``memory_aware``: by memory; ``even``: equal; ``spread``: on all."""
    context: Count = 8192
    """Context length per slot if the request names none and memory allows."""
    slots: Annotated[int, Meta(ge=1, le=MOST_SLOTS)] = 4
    """Parallel requests per model; fewer if memory is short."""
    type_k: KvType = "f16"
    """KV cache of keys; ``q8_0`` halves it."""
    type_v: KvType = "f16"
    """KV cache of values."""
    ubatch: Annotated[int, Meta(ge=1)] = 512
    """Prompt tokens computed per step."""
    keep_alive: Seconds = 300.0
    """Idle seconds before a model is unloaded; negative: never."""
    spare: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    """Fraction of each device's memory that plans leave free."""
    max_workers: Annotated[int, Meta(ge=1, le=15)] = 15
    """Most machines, besides the head, that one model is spread over."""
    enable_distributed: bool = True
    """Spread models over machines; false: run only models that fit one machine."""
    distributed_threshold: float = 0.0
    """Parameters in billions from which a model is sharded even if it fits one machine; 0: never."""
    speculation: Speculate = "auto"
    """Draft some tokens and check them in one batch. ``auto``: for models over several machines, where it is
    predicted to make them at least 1.1 times as fast; ``mtp``: by the model's own layer for next-token
    prediction; ``ngram``: from repeats of the conversation's own text; a model's name: by that model;
    ``off``: never."""


@dataclass(frozen=True, slots=True)
class OllamaSettings:
    """``[ollama]``: the Ollama on this machine."""

    enabled: bool = True
    """Use an Ollama that runs on this machine."""
    url: str = ""
    """Empty: ``$OLLAMA_HOST`` where that is this machine, the one in Ollama's unit, or ``http://127.0.0.1:11434``."""
    manage: bool = False
    """Start and supervise Ollama if it is installed and not running."""
    binary: str = ""
    """Path of ``ollama``; empty: found in PATH."""
    evict: bool = True
    """Unload its idle models when another model needs the memory."""
    strategy: Literal["intelligent", "least_loaded", "latency_first", "round_robin"] = "intelligent"
    """How to choose among several endpoints."""


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """``[serving]``: requests."""

    queue: Count = 512
    """Requests queued at an endpoint, or waiting for a model to load, before 503."""
    bodies: Bytes = GIB
    """Total bytes of request bodies held at a time before 503; 0: no limit."""
    stall: Seconds = 120.0
    """Least seconds without a token before a stream counts as hung; 0 or negative: never."""
    still: Seconds = 15.0
    """The same if the engine's processes used no CPU either: stopped or deadlocked, not slow."""
    drain_limit: Limit = 60.0
    """Seconds that running streams may go on after the daemon is told to stop."""
    recover_limit: Limit = 300.0
    """Seconds that a stream waits for its model after a failure; longer while a load makes progress."""
    kept_prompts: Bytes = 4 * GIB
    """Bytes on disk for what engines have read of prompts: kept when an idle model is unloaded, for when it
    is loaded again, until the daemon stops. Only the daemon's user can read them. 0: none. Nothing is kept of
    models whose attention slides over a window (Gemma, gpt-oss), nor where a model or a layer drafts tokens:
    llama.cpp would read all anew, or draft nothing that is right."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """``[log]``: what is written to the journal or the terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is written."""
    requests: Literal["off", "inference", "all"] = "inference"
    """Which HTTP requests get a line (never with prompts or answers): ``inference``: those to models, orders
    and what was refused; ``all``; ``off``."""
    traces: UrlText = ""
    """Where traces of requests are sent: an OpenTelemetry collector (OTLP over HTTP), as
    ``http://collector:4318``. It needs OpenTelemetry, the extra ``traces`` of the wheel; empty: nowhere."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings file, a section an attribute."""

    node: NodeSettings = field(default_factory=NodeSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    ollama: OllamaSettings = field(default_factory=OllamaSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    log: LogSettings = field(default_factory=LogSettings)

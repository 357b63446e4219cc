"""The settings as dataclasses. One class per section of ``sollold.toml``; every field has a default.

`sollold.settings.load` reads and checks them and tracks where each value came from.
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
"""A size in bytes, written as a number or with a unit: ``"20 GiB"``, ``"400 MB"``."""
Seconds = Annotated[float, Meta(title="seconds")]
"""A duration in seconds, written as a number or with a unit: ``"5m"``, ``"1h30m"``."""
Limit = Annotated[float, Meta(ge=0, le=1e8, title="seconds")]
"""`Seconds` as a maximum waiting time: never negative, never infinite."""
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
"""0: any free port."""
Count = Annotated[int, Meta(ge=0, title="count")]
MOST_SLOTS = 64
"""Maximum number of parallel requests of one deployment."""
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
    """Maximum memory for models over all devices; 0: limited only by the devices."""
    device_limits: dict[str, Bytes] = field(default_factory=dict)
    """Maximum memory for models per device (``CUDA0 = "20 GiB"``)."""
    reserve: Bytes = 512 * MIB
    """RAM kept free for the rest of the machine."""
    gpu_reserve: Bytes = 256 * MIB
    """Memory of every GPU kept free for other programs."""
    devices: tuple[str, ...] = ()
    """Devices that may be used; empty: all GPUs and the CPU."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """``[http]``: the HTTP API."""

    host: str = "0.0.0.0"
    """Address to listen on; ``127.0.0.1`` keeps the API to this machine."""
    port: Port = HTTP_PORT
    """Port for browsers and clients of Ollama, OpenAI and Anthropic."""
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
    """Names by which clients may address this node in addition to IP addresses, the nodes' names, localhost,
    *.local (for programs on this machine, of these only its own name), *.lan, *.internal and *.home.arpa;
    ``*.example.com``: all subdomains; ``*``: any (no protection against DNS rebinding)."""
    auth: Literal["", "open", "keys"] = ""
    """Who needs an API key. ``open``: other machines may use models and read without one; ``keys``: they need
    one for everything; empty: as ``open`` until the first key is made. Programs on this machine never need
    one; commands from other machines (load, delete, drain …) always do."""
    trusted_proxies: tuple[ProxyText, ...] = ()
    """Addresses or networks of reverse proxies whose ``X-Forwarded-For`` is trusted (``10.0.0.0/8``)."""
    tls: Literal["off", "cluster", "own"] = "off"
    """HTTPS for other machines; programs on this machine may still use HTTP. ``cluster``: with a certificate
    of the cluster's own authority, which ``sollold cluster ca`` prints; ``own``: with the one in
    ``tls_certificate``; ``off``: as ``cluster``, but HTTP is allowed too."""
    tls_certificate: str = ""
    """For ``tls = "own"``: PEM file with the certificate and its issuers. A renewed file is reloaded
    automatically."""
    tls_key: str = ""
    """PEM file with the certificate's key, without a password."""
    wait_limit: Limit = 600.0
    """Seconds that a request waits for a model to load before it fails with 503."""

    @property
    def requires_tls(self) -> bool:
        """Whether other machines must use HTTPS."""
        return self.tls != "off"


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """``[cluster]``: which nodes belong together and how they find each other."""

    token: Token = ""
    """The cluster's secret, 64 hex digits; empty: as ``door`` says."""
    old_tokens: tuple[Token, ...] = ()
    """Older secrets still accepted while ``token`` is being changed."""
    door: Door = "1h"
    """Without a token: ``open``: anyone on the LAN can join, until ``sollold cluster secure``. A time such as
    ``1h``: the cluster has a random secret; new machines are admitted automatically for this long after its
    founding, and later by ``sollold admit``. ``closed``: only by that."""
    host: str = "::"
    """Address to listen on for other nodes; ``::``: IPv6 and IPv4, ``0.0.0.0``: IPv4 only."""
    port: Port = 11436
    """UDP for gossip, TCP (TLS) for everything else between nodes; preferably the same on all nodes."""
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
    """Path of ``llama-server``; empty: found automatically, or built."""
    rpc_server: str = ""
    """Path of ``ggml-rpc-server``, from the same build."""
    build: bool = True
    """Build the pinned version if none is found."""
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
    """``host:port`` of external llama.cpp RPC workers; RPC_BACKENDS in the environment sets it too."""
    allow_plain_workers: bool = False
    """Use external workers. They are neither authenticated nor encrypted: anyone on the network can read and
    change what they compute."""
    extra_args: tuple[str, ...] = ()
    """Arguments added to every ``llama-server`` command line."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Properties of a model that no node has yet. All fields are optional."""

    parameters: Annotated[float, Meta(ge=0)] = 0.0
    """Number of parameters, in billions."""
    memory: Bytes = 0
    """Memory needed, including its context; 0: estimated from the parameters."""
    requires_distributed: bool = False
    """Spread it over machines even if it fits on one."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """``[models]``: where models are."""

    folders: tuple[str, ...] = ()
    """Folders with GGUF files; read, never written."""
    ollama_stores: tuple[str, ...] = ()
    """Roots of Ollama stores; empty: Ollama's default. A managed Ollama uses the first."""
    huggingface: bool = True
    """Use models in the Hugging Face cache and in llama.cpp's older cache."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Additional model names (``gpt-4o = "llama3.1:70b"``)."""
    profiles: dict[str, ModelProfile] = field(default_factory=dict)
    """Properties of models that no node has yet: [models.profiles."llama3.1:405b"] with parameters (in
    billions), memory and requires_distributed. Used for plans until a node has the model's file."""
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
    """Type of the KV cache's keys; ``q8_0`` halves them."""
    type_v: KvType = "f16"
    """Type of the KV cache's values."""
    ubatch: Annotated[int, Meta(ge=1)] = 512
    """Prompt tokens computed per step."""
    keep_alive: Seconds = 300.0
    """Idle seconds before a model is unloaded; negative: never."""
    spare: Annotated[float, Meta(ge=0, le=0.5)] = 0.02
    """Fraction of each device's memory that plans leave free."""
    max_workers: Annotated[int, Meta(ge=1, le=15)] = 15
    """Maximum number of machines, besides the head, that one model is spread over."""
    enable_distributed: bool = True
    """Spread models over machines; false: run only models that fit on one machine."""
    distributed_threshold: float = 0.0
    """Parameters in billions from which a model is sharded even if it fits on one machine; 0: never."""
    speculation: Speculate = "auto"
    """Draft several tokens and verify them in one batch. ``auto``: for models spread over machines, if it is
    predicted to make them at least 1.1 times as fast; ``mtp``: with the model's own layers for multi-token
    prediction; ``ngram``: from repetitions in the conversation's own text; a model's name: with that model;
    ``off``: never."""


@dataclass(frozen=True, slots=True)
class OllamaSettings:
    """``[ollama]``: the Ollama on this machine."""

    enabled: bool = True
    """Use the Ollama that runs on this machine."""
    url: str = ""
    """Empty: ``$OLLAMA_HOST`` if that is this machine, the one in Ollama's unit, or ``http://127.0.0.1:11434``."""
    manage: bool = False
    """Start and supervise Ollama if it is installed and not running."""
    binary: str = ""
    """Path of ``ollama``; empty: search PATH."""
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
    """Total bytes of request bodies held at once before 503, and as many of large answers that clients have
    not read yet; 0: no limit."""
    stall: Seconds = 120.0
    """Minimum seconds without a token before a stream counts as hung; 0 or negative: never."""
    still: Seconds = 15.0
    """The same if the engine's processes used no CPU either: stopped or deadlocked, not slow. 0 or negative:
    never."""
    drain_limit: Limit = 60.0
    """Seconds that running streams may continue after the daemon is told to stop."""
    recover_limit: Limit = 300.0
    """Seconds that a stream waits for its model after a failure; longer while a load makes progress."""
    kept_prompts: Bytes = 4 * GIB
    """Disk space for processed prompts: saved when an idle model is unloaded, for its next load, and
    deleted when the daemon stops. Only the daemon's user can read them. 0: none. Nothing is saved for models
    with sliding-window attention (Gemma, gpt-oss), nor if a draft model or MTP layer is used: llama.cpp would
    process the prompts again, or produce wrong drafts."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """``[log]``: what is written to the journal or the terminal."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Log level."""
    requests: Literal["off", "inference", "all"] = "inference"
    """Which HTTP requests are logged (never with prompts or answers): ``inference``: requests to models,
    commands and refused requests; ``all``; ``off``."""
    traces: UrlText = ""
    """OpenTelemetry collector to send traces of requests to (OTLP over HTTP), such as
    ``http://collector:4318``. Needs OpenTelemetry, the wheel's extra ``traces``; empty: none."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings, one attribute per section of the file."""

    node: NodeSettings = field(default_factory=NodeSettings)
    http: HttpSettings = field(default_factory=HttpSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    llama: LlamaSettings = field(default_factory=LlamaSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    ollama: OllamaSettings = field(default_factory=OllamaSettings)
    serving: ServingSettings = field(default_factory=ServingSettings)
    log: LogSettings = field(default_factory=LogSettings)

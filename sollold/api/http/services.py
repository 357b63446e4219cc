"""The services that the HTTP application's routes use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import field

from sollold.control.admission import AdmissionService
from sollold.control.cluster import ClusterService
from sollold.control.engine_metrics import EngineMetrics
from sollold.control.finding import Finding
from sollold.control.keys import Keys
from sollold.control.logs import LogService
from sollold.control.member_pass import MemberPasses
from sollold.control.models import ModelService, PullService
from sollold.control.monitor import Monitor
from sollold.control.ollama_relay import OllamaRelay
from sollold.control.responses import ResponseService
from sollold.facts import dataclass
from sollold.serving.counters import Counters
from sollold.serving.request import Service


async def _nothing_found() -> list[Finding]:
    return []


@dataclass(frozen=True, slots=True)
class AppServices:
    """The services that the API is built from. Without ``puller`` or ``relay``, their routes return 501."""

    service: Service
    library: ModelService
    cluster: ClusterService
    monitor: Monitor
    logs: LogService
    puller: PullService | None = None
    relay: OllamaRelay | None = None
    responses: ResponseService = field(default_factory=ResponseService)
    findings: Callable[[], Awaitable[list[Finding]]] = _nothing_found
    """Runs the checks of ``doctor``."""
    counters: Counters = field(default_factory=Counters)
    dropped: Callable[[], dict[str, int]] = dict
    """Returns what was dropped of other nodes' messages: reason → count."""
    admission: AdmissionService | None = None
    keys: Keys | None = None
    passes: MemberPasses | None = None
    engine_metrics: EngineMetrics | None = None

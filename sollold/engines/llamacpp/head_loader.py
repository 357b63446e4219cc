"""Starts a deployment's ``llama-server``, if necessary again, without what llama.cpp can't load."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from sollold.engines.commands import Deploy
from sollold.engines.install.find import Llama
from sollold.engines.llamacpp.command_line import WorkerAddress, can_draft
from sollold.engines.llamacpp.context import DeploymentContext
from sollold.engines.llamacpp.llama_server import Head, HeadFailed
from sollold.engines.llamacpp.load_progress import max_load_seconds
from sollold.models.model import Model

log = logging.getLogger("sollold.engines")

_TRIES = 3
"""Maximum number of starts because of a port that another program took."""


class HeadLoader:
    """Loads the model of one deployment.

    Attributes:
        head: the process started last; None before that.
        without: what it runs without, and why; empty if it has everything.
        drafts: whether it drafts as planned.
    """

    def __init__(
        self,
        request: Deploy,
        model: Model,
        draft: Model | None,
        llama: Llama,
        context: DeploymentContext,
        on_progress: Callable[[float], None],
    ) -> None:
        self._deployment = request.deployment
        self._plan = request.plan
        self._model = model
        self._draft = draft
        self._llama = llama
        self._context = context
        self._on_progress = on_progress
        self.head: Head | None = None
        self.without = ""
        drafter = request.plan.drafts_by
        self.drafts = bool(drafter) and can_draft(llama, drafter)
        if drafter and not self.drafts:
            why = "this build of llama.cpp does not support them"
            self.without = f"running without drafts by {drafter}: {why}"

    async def load(self, workers: list[WorkerAddress]) -> Head:
        """Start ``llama-server`` and wait until it answers.

        Raises:
            HeadFailed: it can't load the model, or takes too long.
        """
        model, plan, tries, limit = self._model, self._plan, _TRIES, max_load_seconds(self._model)
        while True:
            tries -= 1
            self.head = await Head.start(
                plan,
                model,
                self._llama,
                workers,
                deployment=self._deployment,
                context=self._context,
                on_progress=self._on_progress,
                draft=self._draft,
            )
            try:
                async with asyncio.timeout(limit):
                    await self.head.ready(self._context.http)
                return self.head
            except TimeoutError as error:
                raise HeadFailed(f"the model was not loaded within {limit / 60:.0f} minutes") from error
            except HeadFailed as error:
                if error.projector and model.projector:
                    self._go_without("its projector", error)
                    model = replace(model, projector="")
                elif error.draft and plan.drafts_by:
                    self._go_without(f"drafts by {plan.drafts_by}", error)
                    plan, self.drafts = replace(plan, drafts_by=""), False
                elif not error.port or not tries:
                    raise
                await self.head.stop(0.0)

    def _go_without(self, part: str, error: HeadFailed) -> None:
        reason = f"running without {part}, which llama.cpp can't load: {error}"
        self.without = f"{self.without}; {reason}" if self.without else reason
        log.warning("%s: %s", self._plan.model, reason, extra={"deployment": self._deployment})

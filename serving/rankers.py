"""The rankers as the service asks them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from features.errors import UnavailableError, raised
from serving.api import ModelDescription
from serving.memo import Ranked

NO_RANKER = "the model does not answer, its process has ended; try again"

OTHER_SECONDS = 1.0
"""Seconds within which another ranker must answer in the place of one that has ended."""

LOG = logging.getLogger("ray.serve")


class Rankers:
    """Asks a ranker. After one has ended nobody waits for it, until another is there.

    Args:
        replicas: rankers; with several a user's requests meet the same one, and another where that one has ended.

    Every method raises:
        UnavailableError: its replica is dead, or none is there; Ray's own words are for the log.
        Exception: what it raised, as it was raised there.
    """

    def __init__(self, handle: DeploymentHandle[Any], replicas: int) -> None:
        self._handle, self._replicas = handle, replicas
        self._missing: asyncio.Task[None] | None = None  # runs while no ranker answers

    async def describe(self, artifact: str) -> ModelDescription:
        """The model, loaded and checked if it was not yet."""
        description: ModelDescription = await self._ask(self._handle.describe, artifact, artifact)
        return description

    async def rank(self, user_id: str, artifact: str, row: pa.Table, erased: int) -> Ranked:
        """Scores of one row, as :class:`serving.ranker.BoundRow` has it."""
        several = self._replicas > 1
        handle = self._handle.options(session_id=user_id) if several else self._handle
        try:
            ranked: Ranked = await self._ask(handle.rank, artifact, (artifact, row, erased))
        except UnavailableError:
            if not several:
                raise
            if self._missing is not None:
                await asyncio.wait([self._missing], timeout=OTHER_SECONDS)
            ranked = await self._ask(handle.rank, artifact, (artifact, row, erased))
        return ranked

    async def explain(self, artifact: str, row: pa.Table) -> dict[str, np.ndarray]:
        """What the candidates of one row attend to (:func:`models.attention.attention_weights`)."""
        weights: dict[str, np.ndarray] = await self._ask(self._handle.explain, artifact, artifact, row)
        return weights

    async def forget(self, artifact: str, erased: int) -> None:
        """Have one ranker forget what it remembers from before a moment."""
        await self._ask(self._handle.forget, artifact, erased)

    async def _ask(self, method: Any, artifact: str, *arguments: Any) -> Any:
        if self._missing is not None and not self._missing.done():
            raise UnavailableError(NO_RANKER)
        try:
            return await method.remote(*arguments)
        except (RayError, RayServeException) as failure:
            error = raised(failure)
            if not isinstance(error, (RayError, RayServeException)):
                raise error from None
            LOG.error("the model does not answer", exc_info=failure)
            if self._missing is None or self._missing.done():
                self._missing = asyncio.create_task(self._until_answered(artifact))
            raise UnavailableError(NO_RANKER) from None

    async def _until_answered(self, artifact: str) -> None:
        """Wait for a ranker, as every request would in Ray's queue."""
        while True:
            try:
                await self._handle.describe.remote(artifact)
                return
            except (RayError, RayServeException) as failure:
                if not isinstance(raised(failure), (RayError, RayServeException)):
                    return  # what a model says is an answer, too: a ranker is there
                await asyncio.sleep(0.2)

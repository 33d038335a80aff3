"""The deployment that runs the models.

One request travels as one row of the sample table. Requests that wait together are merged into one ``RequestBatch``;
the user side of a request is computed once, however many candidates it has, and remembered (:mod:`serving.memo`).
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from ray import serve

from features.batch import collate
from features.sample_table import concatenate
from models.artifact import Artifact, load_artifact
from models.attention import attention_weights
from models.memory import keep_freed_memory
from models.selfcheck import require_selfcheck
from serving.api import ModelDescription
from serving.memo import MemoisedModel, Ranked
from serving.settings import ServingSettings


class BoundRow(NamedTuple):
    """A request as it is sent to the ranker.

    Attributes:
        artifact: of the model that it is bound to.
        row: in the layout of ``serving_schema``.
        erased: when users had last been forgotten as it was read, microseconds UTC.
    """

    artifact: str
    row: pa.Table
    erased: int = 0


MOST_MODELS = 4
"""Models that a ranker holds: the one that is served, the one before or after it, that of a split, and a shadow."""


class Ranker:
    """Runs the models that requests ask for, on merged batches of requests."""

    def __init__(self, settings: ServingSettings) -> None:
        keep_freed_memory()
        torch.set_num_threads(
            settings.ranker_threads or max(1, (os.cpu_count() or 1) // settings.options.ranker_replicas)
        )
        self._models: OrderedDict[str, tuple[Artifact, MemoisedModel]] = OrderedDict()
        self._loading, self._order = threading.Lock(), threading.Lock()
        self._chunk_candidates = settings.options.chunk_candidates
        self._erased, self._precision = 0, settings.options.precision
        self._memo_bytes = round(settings.options.memo_megabytes * 1e6)
        self.rank.set_max_batch_size(settings.options.max_batch_requests)  # type: ignore[attr-defined]
        self.rank.set_batch_wait_timeout_s(settings.options.batch_wait_ms / 1e3)  # type: ignore[attr-defined]
        self._model(settings.artifact)

    def _model(self, artifact: str) -> tuple[Artifact, MemoisedModel]:
        """A model, loaded and checked when it is first asked for; the least recently used one may go for it.

        Raises:
            CorankError: it cannot be read, or gives other scores than those stored beside it.
        """
        if (known := self._known(artifact)) is None:
            with self._loading:  # one at a time; requests to models that are loaded do not wait for it
                if (known := self._known(artifact)) is None:
                    loaded = load_artifact(artifact)
                    require_selfcheck(artifact, loaded.model, loaded.metadata.get("selfcheck", {}), self._precision)
                    known = loaded, MemoisedModel(loaded.model, self._memo_bytes, self._precision)
                    gc.collect()
                    gc.freeze()  # what is loaded stays, so that later collections, which stop everybody, skip it
                    with self._order:
                        self._models[artifact] = known
                        while len(self._models) > MOST_MODELS:
                            self._models.popitem(last=False)
        return known

    def _known(self, artifact: str) -> tuple[Artifact, MemoisedModel] | None:
        with self._order:
            if artifact in self._models:
                self._models.move_to_end(artifact)
            return self._models.get(artifact)

    async def describe(self, artifact: str) -> ModelDescription:
        model, _ = await asyncio.to_thread(self._model, artifact)
        return ModelDescription(model.version, model.schema, model.metadata)

    def forget(self, erased: int) -> None:
        """Remember nothing from before this moment; the memo cannot say whose its states are."""
        with self._order:
            newer, self._erased = erased > self._erased, max(erased, self._erased)
            for _, model in self._models.values() if newer else ():
                model.forget()

    async def explain(self, artifact: str, row: pa.Table) -> dict[str, np.ndarray]:
        """Per sequence what each candidate of one request attends to, [C, E]."""
        return await asyncio.to_thread(self._attention, artifact, row)

    def _attention(self, artifact: str, row: pa.Table) -> dict[str, np.ndarray]:
        loaded, _ = self._model(artifact)
        weights = attention_weights(loaded.model, collate(row, loaded.schema))
        return {name: each.float().numpy() for name, each in weights.items()}

    @serve.batch
    async def rank(self, requests: list[BoundRow]) -> list[Ranked]:
        """The result of every request by the model that it is bound to."""
        return await asyncio.to_thread(self.score, requests)

    def score(self, requests: Sequence[BoundRow]) -> list[Ranked]:
        """Scores of these requests, merged per model into batches of at most ``chunk_candidates`` candidates."""
        bound, ranked = [BoundRow(*request) for request in requests], dict[int, Ranked]()
        self.forget(max(request.erased for request in bound))
        for artifact in dict.fromkeys(request.artifact for request in bound):
            places = [place for place, request in enumerate(bound) if request.artifact == artifact]
            rows = concatenate([bound[place].row for place in places])
            _, model = self._model(artifact)
            ranked |= dict(zip(places, model.rank(rows, self._chunk_candidates), strict=True))
            if any(bound[place].erased < self._erased for place in places):  # read before a user was forgotten
                model.forget()
        return [ranked[place] for place in range(len(requests))]

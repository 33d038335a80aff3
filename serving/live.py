"""The models that requests are bound to: which one, and how it is replaced while they are answered.

A request is bound to one model when it is admitted. When another model is to be served (``ServingSettings.follow``), it
is loaded and checked beside the old one and a reader of its features is opened; only then are requests bound to it. No
request waits for that, and none is answered by two models.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from features.delta.paths import file_system
from features.errors import UnavailableError
from features.schema import Schema
from features.store.reader import OnlineReader
from serving.api import ModelDescription, told
from serving.inline import InvalidRequestError
from serving.rankers import Rankers
from serving.settings import ServingSettings, share_of_users
from serving.store_thread import StoreThread

FOLLOW_SECONDS = 1.0
"""Seconds between two looks at which model is to be served."""

LOG = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LiveModel:
    """A model that requests are bound to, with a reader of the features that it reads (its schema, not the config's).

    Attributes:
        artifact: its directory, by which the ranker knows it.
        thread: the only one that uses the reader.
    """

    artifact: str
    model: ModelDescription
    reader: OnlineReader
    thread: StoreThread


@dataclass(frozen=True)
class Followed:
    """What the document of ``ServingSettings.follow`` says.

    Attributes:
        artifact: to be served.
        erased: when users were last forgotten, microseconds UTC.
        split: artifact that answers a share of users, and the share; None: no other one answers.
        shadow: artifact that is asked, too, but not answered by.
    """

    artifact: str
    erased: int = 0
    split: tuple[str, float] | None = None
    shadow: str | None = None

    @property
    def beside(self) -> dict[str, bool]:
        """Artifacts that are needed beside the one that is served, and whether they answer users."""
        shadow = {} if self.shadow is None else {self.shadow: False}
        return shadow | ({} if self.split is None else {self.split[0]: True})


class LiveModels:
    """The model that is served and those beside it.

    Args:
        reading: the thread that reads the online store for what is answered.
        shadow_reading: the one that reads it for a model that is asked, but not answered by.
        erased: awaited when users were forgotten, with the time.
        schema_changed: called when a model of another schema than the first is served.

    Attributes:
        refused: the last artifact that is not fit to be served, and why.
        erased: when users were last forgotten, microseconds UTC.
    """

    def __init__(
        self,
        settings: ServingSettings,
        rankers: Rankers,
        reading: StoreThread,
        shadow_reading: StoreThread,
        erased: Callable[[int], Awaitable[None]],
        schema_changed: Callable[[Schema], None],
    ) -> None:
        self._settings, self._rankers = settings, rankers
        self._reading, self._shadow_reading = reading, shadow_reading
        self._tell_erased, self._tell_schema = erased, schema_changed
        self._opening = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None
        self._served: LiveModel | None = None
        self._beside: dict[str, LiveModel] = {}
        self._named: Followed | None = None
        self._unfit: dict[str, str] = {}
        self.refused: dict[str, str] | None = None
        self.erased = 0

    @property
    def served(self) -> LiveModel | None:
        """The one that requests are bound to now; None before the first."""
        return self._served

    async def open(self) -> LiveModel:
        """The model that requests are bound to now."""
        if self._served is None:
            async with self._opening:
                if self._served is None:
                    await self._begin()
        assert self._served is not None
        if self._settings.follow is not None and (self._following is None or self._following.done()):
            self._following = asyncio.create_task(self._follow())
        return self._served

    async def bind(self, user_id: str, version: str | None) -> LiveModel:
        """The model of a request.

        Args:
            version: the one that is asked for; None: as users are split.

        Raises:
            InvalidRequestError: no model of this version is served.
        """
        served = await self.open()
        if version is not None:
            for live in (served, *self._beside.values()):
                if live.model.version == version:
                    return live
            known = [live.model.version for live in (served, *self._beside.values())]
            raise InvalidRequestError("model_version", f"{version!r} is not served; there are {known}")
        split = self._named.split if self._named is not None else None
        # another hash than that by which users are logged
        if split is not None and share_of_users(f"split {user_id}") < split[1]:
            return self._beside.get(split[0], served)
        return served

    @property
    def shadow(self) -> LiveModel | None:
        """The model that is asked, too, if it is ready."""
        shadow = self._named.shadow if self._named is not None else None
        return self._beside.get(shadow) if shadow is not None else None

    @property
    def beside(self) -> dict[str, Any]:
        """Versions that answer beside the one that is served, and those that cannot."""
        named, found = self._named, dict[str, Any]()
        if named is not None and named.split is not None:
            found["split"] = {"model_version": self._version(named.split[0]), "share": named.split[1]}
        if named is not None and named.shadow is not None:
            found["shadow"] = {"model_version": self._version(named.shadow)}
        return found | ({"unfit": self._unfit} if self._unfit else {})

    def _version(self, artifact: str) -> str | None:
        return self._beside[artifact].model.version if artifact in self._beside else None

    async def _begin(self) -> None:
        """Bind requests to the model that is to be served now or, if it is not fit, to the one of the start."""
        wanted = await self._wanted()
        if wanted is None or not await self._switch(wanted.artifact):
            self._served = await self._prepared(self._settings.artifact, self._reading)
        if wanted is not None:
            await self._attend(wanted)

    async def _prepared(self, artifact: str, thread: StoreThread) -> LiveModel:
        model = await self._rankers.describe(artifact)
        store = replace(self._settings.store, schema=model.schema)
        reader = await thread.run(lambda: OnlineReader(store))
        # a store that was lost has its views, but no tables: then this fails
        await thread.run(lambda: reader.user(""))
        return LiveModel(artifact, model, reader, thread)

    async def _wanted(self) -> Followed | None:
        """What is to be served; None when nothing says so. What the ranker is to forget, it is told."""
        if self._settings.follow is None:
            return None
        document = await asyncio.to_thread(followed, self._settings.follow)
        if document is not None and document.erased > self.erased:
            self.erased = document.erased
            await self._tell_erased(self.erased)
            with suppress(UnavailableError):  # the next request tells it
                await self._rankers.forget(self._settings.artifact, self.erased)
        return document

    async def _follow(self) -> None:
        """Bind requests to each model that is to be served, once it is ready; ``refused`` says why one is not fit.

        A model is loaded beside this, which goes on looking: users who are forgotten meanwhile are.
        """
        changing: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            wanted = await self._wanted()
            if wanted is None or self._served is None or (changing is not None and not changing.done()):
                continue
            changing = asyncio.create_task(self._change(wanted, self._served))

    async def _change(self, wanted: Followed, served: LiveModel) -> None:
        with suppress(UnavailableError):  # the ranker or the store does not answer; tried again
            if wanted.artifact != served.artifact and (
                self.refused is None or wanted.artifact != self.refused["artifact"]
            ):
                await self._switch(wanted.artifact)
            await self._attend(wanted)

    async def _attend(self, wanted: Followed) -> None:
        """Have the models beside the one that is served ready; one that is not fit is left out, and said.

        Raises:
            UnavailableError: the ranker or the store does not answer.
        """
        if self._named is not None and self._named.beside == wanted.beside:
            self._named = wanted
            return
        beside, unfit = {}, {}
        for artifact, answers in wanted.beside.items():
            thread, live = self._reading if answers else self._shadow_reading, self._beside.get(artifact)
            try:
                if live is None or live.thread is not thread:
                    live = await self._prepared(artifact, thread)
                beside[artifact] = live
            except UnavailableError:
                raise
            except Exception as error:
                LOG.exception("model %s is not asked", artifact)
                unfit[artifact] = told(error)
        self._beside, self._unfit, self._named = beside, unfit, wanted

    async def _switch(self, artifact: str) -> bool:
        """Bind requests to a model from now on, once it is ready; returns whether it was fit.

        Raises:
            UnavailableError: the ranker or the store does not answer.
        """
        try:
            live = await self._prepared(artifact, self._reading)
        except UnavailableError:
            raise
        except Exception as error:  # whatever it is, requests stay bound to the model before
            LOG.exception("model %s is not served", artifact)
            self.refused = {"artifact": artifact, "why": told(error)}
            return False
        if artifact != self._settings.artifact:
            self._tell_schema(live.model.schema)
        self._served, self.refused = live, None
        return True


def followed(path: str) -> Followed | None:
    """The document of ``ServingSettings.follow``; None when it is not there or half written."""
    store, inside = file_system(path)
    try:
        with store.open_input_stream(inside) as stream:
            document: Mapping[str, Any] = json.loads(stream.read())
            split = document.get("split")
            return Followed(
                str(document["artifact"]),
                int(document.get("erased", 0)),
                (str(split["artifact"]), float(split["share"])) if split else None,
                document.get("shadow"),
            )
    except (OSError, ValueError, KeyError, TypeError):
        return None

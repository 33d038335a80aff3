"""Feast's registry as a local file that is written whole or not at all; Feast itself overwrites it in place."""

from __future__ import annotations

import os
from typing import Any

from feast.infra.registry.file import FileRegistryStore

from features.damage import problem_of_sealed, seal
from features.errors import UnreadableError


class DamagedRegistryError(UnreadableError):
    """The registry's file cannot be read. All that it holds is derived from the config."""


class WholeRegistryStore(FileRegistryStore):
    """Configured by its import path; Feast asks that its name ends like this."""

    def get_registry_proto(self) -> Any:
        """
        Raises:
            DamagedRegistryError
        """
        problem = problem_of_sealed(self._filepath)
        if problem and self._filepath.exists():
            raise DamagedRegistryError(
                f"the feature store's registry {self._filepath} is damaged (it {problem}); `corank features apply` "
                "makes it again from the config"
            )
        found = super().get_registry_proto()  # type: ignore[no-untyped-call]
        found.DiscardUnknownFields()  # drops the digest, which would else be written again as content
        return found

    def _write_registry(self, registry_proto: Any) -> None:
        path = self._filepath
        path.parent.mkdir(parents=True, exist_ok=True)
        self._filepath = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            super()._write_registry(registry_proto)
            with self._filepath.open("r+b") as stream:
                stream.write(seal(stream.read()))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(self._filepath, path)
        finally:
            self._filepath.unlink(missing_ok=True)
            self._filepath = path

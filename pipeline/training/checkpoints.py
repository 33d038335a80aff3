"""Checkpoints of a training: a folder per epoch with ``state.pt`` and, written last, its digest in ``SHA256SUMS``.

Between epochs there may be others, a folder per step (:meth:`Checkpoints.of_steps`).

Whoever reads one verifies it, so that a damaged or half-written checkpoint is never trained on.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from pyarrow import fs

from features.delta.paths import file_system
from features.errors import CorankError, writing

KEPT = 2
STATE, SUMS = "state.pt", "SHA256SUMS"


class Checkpoints:
    """The checkpoints of one training, below a local folder or an ``s3://`` prefix.

    Args:
        unit: what they are counted in.
    """

    def __init__(self, uri: str, unit: str = "epoch") -> None:
        self.uri, self._unit = uri, unit
        self.fs, self.root = file_system(uri)

    def of_steps(self) -> Checkpoints:
        """Those within the epoch that was begun last, counted in steps from the training's start."""
        return Checkpoints(f"{self.uri}/steps", "step")

    def newest(self, say: Callable[[str], None], anew: bool = True) -> int:
        """Epoch of the newest whole checkpoint, or 0; ``say`` is told of every newer one that is damaged.

        Args:
            anew: whether training starts anew where none is whole.
        """
        epochs = self._epochs()
        for epoch in reversed(epochs):
            if self._digest(epoch) == self._expected(epoch):
                return epoch
            say(f"checkpoint {self.folder(epoch)} is damaged or was not finished: it is not used")
        if epochs and anew:
            say("no checkpoint is whole: training starts anew")
        return 0

    def damaged(self) -> list[int]:
        """Epochs of the checkpoints that are damaged or were not finished; all are read."""
        return [epoch for epoch in self._epochs() if self._digest(epoch) != self._expected(epoch)]

    def remove(self, epoch: int) -> None:
        self.fs.delete_dir(self.folder(epoch))

    def load(self, epoch: int) -> dict[str, Any]:
        """State after an epoch.

        Raises:
            CorankError: the checkpoint is damaged.
        """
        if self._digest(epoch) != self._expected(epoch):
            raise CorankError(f"checkpoint {self.folder(epoch)} is damaged; run again to continue from the one before")
        with self.fs.open_input_file(f"{self.folder(epoch)}/{STATE}") as stream:
            return dict(torch.load(stream, map_location="cpu", weights_only=True))

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Write the state after an epoch and drop all but the newest two; a half-written checkpoint does not count."""
        folder = self.folder(epoch)
        if epoch in self._epochs():
            self.fs.delete_dir(folder)
        with tempfile.TemporaryFile() as local:
            with writing(tempfile.gettempdir()):
                torch.save(state, local)
            size = local.tell()
            local.seek(0)
            digest = hashlib.file_digest(local, "sha256").hexdigest()
            local.seek(0)
            with writing(folder, size):
                self.fs.create_dir(folder, recursive=True)
                with self.fs.open_output_stream(f"{folder}/{STATE}") as stream:
                    shutil.copyfileobj(local, stream, 1 << 20)
                with self.fs.open_output_stream(f"{folder}/{SUMS}") as stream:
                    stream.write(f"{digest}  {STATE}\n".encode())
        for old in self._epochs()[:-KEPT]:
            self.fs.delete_dir(self.folder(old))

    def folder(self, epoch: int) -> str:
        return f"{self.root}/{self._unit}-{epoch:04}"

    def clear(self) -> None:
        """Remove all of them."""
        for epoch in self._epochs():
            self.remove(epoch)

    def _epochs(self) -> list[int]:
        found = self.fs.get_file_info(fs.FileSelector(self.root, allow_not_found=True))
        prefix = f"{self._unit}-"
        names = [entry.base_name.removeprefix(prefix) for entry in found if entry.base_name.startswith(prefix)]
        return sorted(int(name) for name in names if name.isdecimal())

    def _expected(self, epoch: int) -> str:
        try:
            with self.fs.open_input_file(f"{self.folder(epoch)}/{SUMS}") as stream:
                return bytes(stream.read()).decode(errors="replace").partition(" ")[0]
        except FileNotFoundError:
            return "none"

    def _digest(self, epoch: int) -> str:
        try:
            with self.fs.open_input_file(f"{self.folder(epoch)}/{STATE}") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            return "no state"

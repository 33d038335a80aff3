"""The sum of gradients over the workers.

Dense ones travel as one buffer; those of tables as rows and values, which are gathered, as process groups other than
gloo reduce nothing sparse. Every worker adds them up in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


class Gradients:
    """Sums the gradients of a model over all workers, after every backward pass.

    Args:
        dense: parameters with dense gradients.
        tables: parameters with sparse ones.
        world: workers; 1: nothing travels.
        stale: the dense gradients of a step are added up while the next one is computed, and used after it (HyFormer
            3.8.2): W_k = W_(k−1) + g_(k−1).

    Attributes:
        pending: the dense gradients of the step before, as one buffer, where they are ``stale``; a checkpoint holds
            them.
    """

    def __init__(
        self, dense: Sequence[nn.Parameter], tables: Sequence[nn.Parameter], world: int, stale: bool = False
    ) -> None:
        self._dense, self._tables, self._world, self._stale = list(dense), list(tables), world, stale
        self._travelling: tuple[Tensor, Any] | None = None

    @torch.no_grad()
    def exchange(self) -> bool:
        """Put sums over all workers in the place of every parameter's gradient.

        Returns:
            whether there are dense gradients to use: not after the first step where they are stale.
        """
        if self._world > 1:
            for table in self._tables:
                self._gather(table)
        own = self._flat()
        if not self._stale:
            self._spread(own if self._world == 1 else self._summed(own))
            return True
        before = self._arrived()
        self._travelling = (own, self._start(own))
        if before is None:
            return False
        self._spread(before)
        return True

    @torch.no_grad()
    def flush(self) -> bool:
        """Put the last step's sums, which no step followed, in place; returns whether there were any."""
        before = self._arrived()
        self._travelling = None
        if before is not None:
            self._spread(before)
        return before is not None

    @property
    def pending(self) -> Tensor | None:
        return self._arrived()

    @pending.setter
    def pending(self, buffer: Tensor | None) -> None:
        self._travelling = None if buffer is None else (buffer.to(self._dense[0].device), None)

    def _arrived(self) -> Tensor | None:
        if self._travelling is None:
            return None
        buffer, work = self._travelling
        if work is not None:
            work.wait()
        self._travelling = (buffer, None)
        return buffer

    def _start(self, buffer: Tensor) -> Any:
        return torch.distributed.all_reduce(buffer, async_op=True) if self._world > 1 else None

    def _summed(self, buffer: Tensor) -> Tensor:
        torch.distributed.all_reduce(buffer)
        return buffer

    def _flat(self) -> Tensor:
        """All dense gradients in a row; zeros where a worker's share did not reach a parameter."""
        return torch.cat(
            [
                (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                for parameter in self._dense
            ]
        )

    def _spread(self, buffer: Tensor) -> None:
        for parameter, values in zip(
            self._dense, buffer.split([parameter.numel() for parameter in self._dense]), strict=True
        ):
            parameter.grad = values.view_as(parameter)

    def _gather(self, table: nn.Parameter) -> None:
        """The rows of all workers, and their values, as one sparse gradient."""
        if table.grad is None:
            rows = torch.zeros(0, dtype=torch.long, device=table.device)
            values = table.new_zeros(0, table.shape[1])
        else:
            own = table.grad.coalesce()
            rows, values = own.indices()[0], own.values()
        counts = [torch.zeros(1, dtype=torch.long, device=table.device) for _ in range(self._world)]
        torch.distributed.all_gather(counts, torch.tensor([len(rows)], device=table.device))
        sizes = [int(count) for count in counts]
        most = max(sizes)
        if not most:
            return
        all_rows, all_values = self._gathered(rows, most), self._gathered(values, most)
        table.grad = torch.sparse_coo_tensor(
            torch.cat([part[:size] for part, size in zip(all_rows, sizes, strict=True)])[None],
            torch.cat([part[:size] for part, size in zip(all_values, sizes, strict=True)]),
            table.shape,
            check_invariants=False,
        ).coalesce()

    def _gathered(self, own: Tensor, most: int) -> list[Tensor]:
        """Of every worker, filled up to as many rows as the one with most has."""
        filled = own.new_zeros(most, *own.shape[1:])
        filled[: len(own)] = own
        parts = [torch.empty_like(filled) for _ in range(self._world)]
        torch.distributed.all_gather(parts, filled)
        return parts

"""The training loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def task_losses(logits: Tensor, labels: Tensor, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy per task, as sums, so that shares of one step can be added up.

    Args:
        logits, labels: [C, K]; mask: [C, K], False where a label is not known; weight: [C].

    Returns:
        weighted loss per task and its total weight, [K] each.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = functional.binary_cross_entropy_with_logits(exact, labels.to(exact.dtype), reduction="none")
    # what has no label or no weight takes no part, whatever its score is
    effective = weight[:, None].where(mask, 0)
    return (loss.where(effective != 0, 0) * effective).sum(0), effective.sum(0)

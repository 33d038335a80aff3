"""The plain form of the attention, by which the kernels are tested.

Shape suffixes: H heads, D head width, B queries, E events.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_reference(q_HBD: Tensor, k_HED: Tensor, v_HED: Tensor, sees_BE: Tensor, bias_HBE: Tensor | None) -> Tensor:
    """What ``attend`` computes, over all events at once; ``sees_BE`` tells what each query sees."""
    logits_HBE = torch.bmm(q_HBD, k_HED.transpose(1, 2)) / q_HBD.shape[-1] ** 0.5
    if bias_HBE is not None:
        logits_HBE = logits_HBE + bias_HBE
    weights_HBE = logits_HBE.masked_fill(~sees_BE, torch.finfo(logits_HBE.dtype).min).softmax(-1)
    parts_HBED: Tensor = weights_HBE[..., None] * v_HED[:, None]
    return parts_HBED.masked_fill(~sees_BE[..., None], 0).sum(2)

"""The softmax over what each query sees (eq. 8 of MixFormer).

Shape suffixes as in the plan: H heads, D head width, B queries, E events, A buckets of age; within a group of similar
timelines: G timelines, Q queries, T events, P padded rows.

What a query does not see cannot change its result. Multiplication by zero would not hide it, since zero times NaN is
NaN: rows without a place are filled with zero, and a group with values that are not finite is computed without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.blocks.attention.observed import unobserved
from models.blocks.attention.plan import HIDDEN, TIME_BUCKETS, Group, Plan


def attend(q_HBD: Tensor, k_HED: Tensor, v_HED: Tensor, plan: Plan | None, bias_HA: Tensor | None) -> Tensor:
    """Softmax attention of every query over what it sees; zero for a query that sees nothing (eq. 8).

    Args:
        bias_HA: relative-time bias per head and bucket of age, [H, TIME_BUCKETS], or None.

    Returns:
        [H, B, D].
    """
    if not q_HBD.is_meta and torch.is_autocast_enabled(q_HBD.device.type):
        # the products are of this precision, so what hides events from them must be of it, too
        shared, dtype = v_HED is k_HED, torch.get_autocast_dtype(q_HBD.device.type)
        q_HBD, k_HED = q_HBD.to(dtype), k_HED.to(dtype)
        v_HED = k_HED if shared else v_HED.to(dtype)
    with unobserved() as weights:
        if weights is not None:  # of each event: what comes of values that are 1 for it and 0 for others
            H, E = len(q_HBD), k_HED.shape[1]
            weights.append(attend(q_HBD, k_HED, torch.eye(E, dtype=k_HED.dtype).expand(H, E, E), plan, bias_HA))
    if plan is None:  # Everything still takes part: data-parallel training waits for every parameter's gradient.
        nothing = sum(
            (tensor[:0].sum() for tensor in (q_HBD, k_HED, v_HED, bias_HA) if tensor is not None), q_HBD.new_zeros(())
        )
        return nothing.expand(*q_HBD.shape[:2], v_HED.shape[-1])
    table = bias_HA.to(q_HBD.dtype) if bias_HA is not None else q_HBD.new_zeros(1, TIME_BUCKETS)
    # The lowest number and not −∞, which would make the softmax of a query without events NaN; it is zeroed afterwards.
    table_HA = functional.pad(table, (0, 1), value=torch.finfo(q_HBD.dtype).min)
    q, k = plan.queries.pad(q_HBD), plan.events.pad(k_HED)
    v = k if v_HED is k_HED else plan.events.pad(v_HED)
    groups = zip(plan.groups, q, k, v, strict=True)
    return plan.queries.unpad([_attend_group(*group_qkv, table_HA) for group_qkv in groups])


def _attend_group(group: Group, q_HPD: Tensor, k_HPD: Tensor, v_HPD: Tensor, table_HA: Tensor) -> Tensor:
    """Attention within each timeline of a group, [H, G · Q, D]."""
    q_HGQD, k_HGTD, v_HGTD = (x.unflatten(1, (group.size, -1)) for x in (q_HPD, k_HPD, v_HPD))
    mask: Tensor = _Lookup.apply(table_HA, group.code)  # type: ignore[no-untyped-call]
    out = _softmax_attention(q_HGQD, k_HGTD, v_HGTD, mask)
    if not _is_finite(out.detach()):
        # Computed again with zeros in place of what is not finite; queries that see none of it get the same sums.
        hidden = group.code == HIDDEN
        lost_Q, lost_T = ~q_HGQD.isfinite().all(-1), ~(k_HGTD.isfinite() & v_HGTD.isfinite()).all(-1)
        q, k, v = (
            x.masked_fill(lost[..., None], 0) for x, lost in ((q_HGQD, lost_Q), (k_HGTD, lost_T), (v_HGTD, lost_T))
        )
        met = lost_Q | (lost_T[:, :, None] & ~hidden).any(-1)
        out = _softmax_attention(q, k, v, mask).masked_fill(met[..., None], torch.nan)
    if out.requires_grad:
        out.register_hook(_without_lost_rows)
    return out.flatten(1, 2)


def _is_finite(x: Tensor) -> bool:
    """Whether the sum of x is finite, which tells that all of x is; a tensor without values (meta) counts as finite."""
    return x.is_meta or bool(x.sum().isfinite())


def _without_lost_rows(gradient: Tensor) -> Tensor | None:
    """The gradient with zeros for each query whose own is not finite; None when all are finite.

    A gradient that is not finite would reach all events of the query's timeline, also those it did not see. The
    parameters behind the attention still have it in their gradients, so that it is not overlooked.
    """
    if _is_finite(gradient):
        return None
    return gradient.masked_fill(~gradient.isfinite().all(-1, keepdim=True), 0)


def _softmax_attention(q_HGQD: Tensor, k_HGTD: Tensor, v_HGTD: Tensor, mask: Tensor) -> Tensor:
    """softmax(q kᵀ / √D + mask) v, [H, G, Q, D]."""
    H, G, Q, _ = q_HGQD.shape
    if not mask.requires_grad:
        mask = mask.expand(len(mask), G, Q, mask.shape[-1])
        return functional.scaled_dot_product_attention(q_HGQD, k_HGTD, v_HGTD, attn_mask=mask)
    # The fused kernels take no mask that learns. This computes the same, without the extra passes of their fallback.
    q, k, v = (x.flatten(0, 1) for x in (q_HGQD, k_HGTD, v_HGTD))
    logits = torch.baddbmm(mask.expand(H, -1, -1, -1).flatten(0, 1), q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.bmm(logits.softmax(-1), v).view(H, G, Q, -1)


class _Lookup(torch.autograd.Function):
    """table[:, code]. The gradient is one scatter, where autograd would add element by element."""

    @staticmethod
    def forward(ctx: Any, table_HA: Tensor, code: Tensor) -> Tensor:
        ctx.save_for_backward(code)
        ctx.shape = table_HA.shape
        return table_HA.index_select(1, code.flatten()).view(-1, *code.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (code,) = ctx.saved_tensors
        flat = gradients[0].flatten(1)
        return flat.new_zeros(ctx.shape).scatter_add_(1, code.flatten().expand_as(flat), flat), None

"""MixFormer and UI-MixFormer written from the equations alone: one candidate, one head, one event at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from features.batch import RequestBatch
from models.blocks.mixing import HeadMixing, NoMixing, SelfAttentionMixing
from models.mixformer.model import MixFormer, MixFormerBlock
from tests.models.naive import (
    Event,
    after,
    before,
    bucket,
    feed_forward,
    samples,
    softmax_sum,
    tower_logits,
)


def mixformer_logits(model: MixFormer, batch: RequestBatch) -> Tensor:
    """Logits [C, K], candidate by candidate."""
    schema, N_U, scores = model.schema, model.user_heads, []
    for sample in samples(model, batch, model.align, model.config.event_time):
        e_U = torch.cat([sample.features[one.name] for one in schema.user_side])
        e_G = torch.cat([sample.features[one.name] for one in schema.item_side])
        if N_U:
            X = split(e_U, model.user_split.project.weight) + split(e_G, model.item_split.project.weight)
        else:
            X = split(torch.cat([e_U, e_G]), model.item_split.project.weight)  # eq. 1, 2
        S = [event for one in schema.sequences for event in sample.sequences[one.name]]
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, MixFormerBlock)
            sequence_ffn = model.sequence[layer if len(model.sequence) > 1 else 0]
            H = [Event(feed_forward(sequence_ffn, event.s), event.ts) for event in S]  # eq. 5
            X = block_of(block, X, H, sample.ts, N_U)
        scores.append(tower_logits(model.towers, X, schema))
    return torch.stack(scores)


def split(e: Tensor, weight: Tensor) -> list[Tensor]:
    """Eq. 2, with zeros at the end where the width does not divide by the heads."""
    N, d, _ = weight.shape
    padded = torch.cat([e, e.new_zeros(N * d - len(e))])
    return [padded[j * d : (j + 1) * d] @ weight[j] for j in range(N)]


def block_of(block: MixFormerBlock, X: list[Tensor], H: list[Event], ts: int, N_U: int) -> list[Tensor]:
    """Eq. 3–11 for one candidate."""
    N, D = len(X), len(X[0])
    mixed = mixing(block.mixing, [before(block.mix_norm, X[i], i) for i in range(N)], N_U)
    fused = []
    for i in range(N):
        p = after(block.mix_norm, mixed[i] + X[i], i)  # eq. 3
        q = feed_forward(block.query, p, i)  # eq. 4
        h = [event.s[i * D : (i + 1) * D] for event in H]  # eq. 6
        keys, values = [one @ block.key.weight[i] for one in h], [one @ block.value.weight[i] for one in h]  # eq. 7
        bias = [0.0 if block.time_bias is None else block.time_bias[i, bucket(ts - event.ts)] for event in H]
        z = softmax_sum(q, keys, values, bias) + q  # eq. 8
        fused.append(feed_forward(block.fusion, z, i))  # eq. 9
    return fused


def mixing(module: HeadMixing | SelfAttentionMixing | NoMixing, X: list[Tensor], N_U: int) -> list[Tensor]:
    N, D = len(X), len(X[0])
    if isinstance(module, NoMixing):
        return [torch.zeros_like(x) for x in X]
    if isinstance(module, HeadMixing):
        S = D // N
        mixed = [torch.cat([X[k][i * S : (i + 1) * S] for k in range(N)]) for i in range(N)]
        mask = [[0.0 if i < N_U and j >= N_U * D / N else 1.0 for j in range(D)] for i in range(N)]  # eq. 10
        return [torch.tensor(mask[i]).to(mixed[i]) * mixed[i] for i in range(N)]  # eq. 11
    out = []
    for i in range(N):
        seen = range(N_U) if i < N_U else range(N)
        A = module.attention_heads
        W = D // A
        parts = []
        for a in range(A):
            cut = slice(a * W, (a + 1) * W)
            q = (module.query.weight @ X[i])[cut]
            both = [module.key_value.weight @ X[j] for j in seen]
            logits = torch.stack([q @ one[:D][cut] / math.sqrt(W) for one in both])
            weights = torch.exp(logits - logits.max())
            parts.append(sum(w * one[D:][cut] for w, one in zip(weights / weights.sum(), both, strict=True)))
        out.append(module.out.weight @ torch.cat(parts))
    return out

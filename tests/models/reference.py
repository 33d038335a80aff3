"""MixFormer and UI-MixFormer written from the equations alone: one candidate, one head, one event at a time.

Slow on purpose; it shares nothing with the fast path but the parameters and the embedded inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from features.batch import Jagged, RequestBatch, Values
from models.inputs import InputLayer
from models.layers import TIME_BUCKETS, PerHeadSwiGLU
from models.mixformer import MixFormer, MixFormerBlock


def row(values: Values, index: int) -> Values:
    """One row of a field."""
    if isinstance(values, Jagged):
        start, stop = int(values.offsets[index]), int(values.offsets[index + 1])
        return Jagged(values.values[start:stop], torch.tensor([0, stop - start]))
    return values[index : index + 1]


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + torch.finfo(x.dtype).eps) * scale


def head_ffn(ffn: PerHeadSwiGLU, head: int, x: Tensor) -> Tensor:
    """SwiGLUFFN_i."""
    both = x @ ffn.gate_up.weight[head]
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    return (gate * torch.sigmoid(gate) * up) @ ffn.out.weight[head]


def block(module: MixFormerBlock, X: list[Tensor], S: list[Tensor], ages: list[int], N_U: int) -> list[Tensor]:
    """Eq. 3–11 for one candidate; S: aligned events in N·D, ages: bucket of each."""
    N, D = len(X), len(X[0])
    width = D // N
    normed = [rms(X[k], module.mix_norm.scale[k]) for k in range(N)]
    heads = []
    for i in range(N):
        mixed = torch.cat([normed[k][i * width : (i + 1) * width] for k in range(N)])
        if i < N_U:  # eq. 10
            mask = torch.tensor([1.0 if j < N_U * width else 0.0 for j in range(D)], dtype=mixed.dtype)
            mixed = mixed * mask
        p = mixed + X[i]
        q = head_ffn(module.query_ffn, i, rms(p, module.query_norm.scale[i])) + p
        z = q
        if S:
            keys, values, logits = [], [], []
            for s, age in zip(S, ages, strict=True):
                both = module.sequence_ffn.gate_up.weight @ rms(s, module.sequence_norm.scale)
                gate, up = both[: len(both) // 2], both[len(both) // 2 :]
                h = module.sequence_ffn.out.weight @ (gate * torch.sigmoid(gate) * up) + s
                h_i = h[i * D : (i + 1) * D]
                keys.append(h_i @ module.key.weight[i])
                values.append(h_i @ module.value.weight[i])
                bias = module.time_bias[i, age] if module.time_bias is not None else 0.0
                logits.append(q @ keys[-1] / math.sqrt(D) + bias)
            weights = torch.softmax(torch.stack(logits), 0)
            z = sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(q)) + q
        heads.append(head_ffn(module.fusion_ffn, i, rms(z, module.fusion_norm.scale[i])) + z)
    return heads


def split(e: Tensor, weight: Tensor) -> list[Tensor]:
    """Eq. 2, with zeros at the end where the width does not divide by the heads."""
    N, d, _ = weight.shape
    padded = torch.cat([e, e.new_zeros(N * d - len(e))])
    return [padded[j * d : (j + 1) * d] @ weight[j] for j in range(N)]


def reference_logits(model: MixFormer, batch: RequestBatch) -> Tensor:
    """Logits [C, K], candidate by candidate."""
    inputs: InputLayer = model.inputs
    schema, N_U = model.schema, model.user_heads
    scores = []
    for r in range(batch.requests):
        e_U = inputs.concatenate(
            schema.side("user", "context"), {k: row(v, r) for k, v in batch.users.fields.items()}, 1
        )[0]
        timeline, ts = int(batch.users.timeline[r]), int(batch.users.ts[r])
        S, ages = [], []
        for sequence in schema.sequences:
            packed = batch.timelines[sequence.name]
            first, end = int(packed.offsets[timeline]), int(batch.users.end[sequence.name][r])
            for t in range(first + max(0, end - sequence.length), first + end):
                s = inputs.concatenate(sequence.fields, {k: row(v, t) for k, v in packed.fields.items()}, 1)[0]
                S.append(model.align[sequence.name](s))
                seconds = max(0, ts - int(packed.ts[t])) / 1e6
                ages.append(min(TIME_BUCKETS - 1, int(math.log2(1 + seconds))))
        for c in range(int(batch.items.offsets[r]), int(batch.items.offsets[r + 1])):
            e_G = inputs.concatenate(schema.side("item"), {k: row(v, c) for k, v in batch.items.fields.items()}, 1)[0]
            if N_U:
                X = split(e_U, model.user_split.project.weight) + split(e_G, model.item_split.project.weight)
            else:
                X = split(torch.cat([e_U, e_G]), model.item_split.project.weight)
            for module in model.blocks:
                assert isinstance(module, MixFormerBlock)
                X = block(module, X, S, ages, N_U)
            o = torch.cat([rms(X[i], model.tower_norm.scale[i]) for i in range(len(X))])
            logits = []
            for k in range(len(schema.tasks)):
                hidden = o @ model.tower_in[:, k] + model.tower_bias[k]
                logits.append((hidden * torch.sigmoid(hidden)) @ model.tower_out[k] + model.output_bias[k])
            scores.append(torch.stack(logits))
    return torch.stack(scores)

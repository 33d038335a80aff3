"""What the loop-by-loop references share: one row, one head, one event at a time, written from the equations.

Slow on purpose; nothing is shared with the models but the parameters and the embeddings of single values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from features.batch import Jagged, RequestBatch, Values
from features.schema import FieldSpec, Schema, Sequence
from models.blocks.ffn import FeedForward, NoFeedForward, PerHeadSwiGLU, SwiGLU
from models.blocks.norms import NoNorm, PostLayerNorm
from models.blocks.towers import TaskTowers
from models.protocol import RankingModel

DAY = 86_400_000_000


@dataclass
class Event:
    """One visible event: its aligned vector and its time in microseconds."""

    s: Tensor
    ts: int


@dataclass
class Sample:
    """One candidate of one request: embeddings by feature, and what it sees of each sequence."""

    features: dict[str, Tensor]
    ts: int
    sequences: dict[str, list[Event]]


def samples(model: RankingModel, batch: RequestBatch, align: Any, event_time: bool) -> Iterator[Sample]:
    """Every candidate of a batch with its own copy of everything."""
    schema = model.schema
    for r in range(batch.requests):
        users = {one.name: embed(model, one, batch.users.fields[one.name], r) for one in schema.user_side}
        sequences = {one.name: visible(model, batch, one, r, align, event_time) for one in schema.sequences}
        for c in range(int(batch.items.offsets[r]), int(batch.items.offsets[r + 1])):
            items = {one.name: embed(model, one, batch.items.fields[one.name], c) for one in schema.item_side}
            yield Sample(users | items, int(batch.users.ts[r]), sequences)


def embed(model: RankingModel, field: FieldSpec, values: Values, index: int) -> Tensor:
    """One value, or the mean of a list of values (zeros for an empty one)."""
    if field.kind == "number":
        number, x = model.inputs.numbers[field.embedding], values[index]
        standard = torch.zeros_like(x) if x.isnan() else (x - number.mean) / number.deviation
        return standard.clamp(-10, 10).to(number.direction.dtype) * number.direction + number.offset
    table = model.inputs.tables[field.embedding].weight
    if isinstance(values, Jagged):
        start, stop = int(values.offsets[index]), int(values.offsets[index + 1])
        rows = [table[int(row)] for row in values.values[start:stop]]
        return sum(rows) / len(rows) if rows else torch.zeros_like(table[0])
    return table[int(values[index])]


def visible(
    model: RankingModel, batch: RequestBatch, sequence: Sequence, r: int, align: Any, event_time: bool
) -> list[Event]:
    """timeline[max(0, end − L):end], aligned."""
    packed = batch.timelines[sequence.name]
    first, end = int(packed.offsets[batch.users.timeline[r]]), int(batch.users.end[sequence.name][r])
    events = []
    for t in range(first + max(0, end - sequence.length), first + end):
        ts = int(packed.ts[t])
        s = torch.cat([embed(model, one, packed.fields[one.name], t) for one in sequence.fields])
        if event_time:
            day, week = 2 * math.pi * (ts % DAY) / DAY, 2 * math.pi * (ts % (7 * DAY)) / (7 * DAY)
            s = torch.cat([s, s.new_tensor([math.sin(day), math.sin(week), math.cos(day), math.cos(week)])])
        linear = align[sequence.name]
        events.append(Event(linear.weight @ s + linear.bias, ts))
    return events


def bucket(microseconds: int) -> int:
    return min(31, int(math.log2(1 + max(0, microseconds) / 1e6)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-6) * scale


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6) * scale + shift


def before(norm: Any, x: Tensor, head: int | None = None) -> Tensor:
    if isinstance(norm, PostLayerNorm | NoNorm):
        return x
    return rms(x, norm.scale if head is None else norm.scale[head])


def after(norm: Any, x: Tensor, head: int | None = None) -> Tensor:
    if not isinstance(norm, PostLayerNorm):
        return x
    return layer_norm(x, *((norm.scale, norm.shift) if head is None else (norm.scale[head], norm.shift[head])))


def swiglu(ffn: SwiGLU | PerHeadSwiGLU, x: Tensor, head: int | None = None) -> Tensor:
    """W_out (silu(W_gate x) ⊙ W_up x)."""
    if isinstance(ffn, PerHeadSwiGLU):
        return (silu(x @ ffn.gate.weight[head]) * (x @ ffn.up.weight[head])) @ ffn.out.weight[head]
    return ffn.out.weight @ (silu(ffn.gate.weight @ x) * (ffn.up.weight @ x))


def feed_forward(sublayer: FeedForward | NoFeedForward, x: Tensor, head: int | None = None) -> Tensor:
    """FFN(Norm(x)) + x."""
    if isinstance(sublayer, NoFeedForward):
        return x
    changed = swiglu(sublayer.ffn, before(sublayer.norm, x, head), head) + x
    return after(sublayer.norm, changed, head)


def softmax_sum(q: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Any]) -> Tensor:
    """Σ_t softmax(q · k_t / √D + bias_t) v_t; zero without events."""
    if not keys:
        return torch.zeros_like(q)
    logits = torch.stack([q @ k / math.sqrt(len(q)) + bias for k, bias in zip(keys, biases, strict=True)])
    weights = torch.exp(logits - logits.max())
    return sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True))


def multi_head(module: Any, q: Tensor, q_ts: int, h: list[Tensor], h_ts: list[int]) -> Tensor:
    """Standard multi-head attention of one query over h."""
    H = module.heads
    W = len(q) // H
    asked = module.query.weight @ q
    both = [module.key_value.weight @ one for one in h]
    parts = []
    for a in range(H):
        cut = slice(a * W, (a + 1) * W)
        keys = [one[: len(q)][cut] for one in both]
        values = [one[len(q) :][cut] for one in both]
        biases = [module.time_bias[a, bucket(q_ts - ts)] if module.time_bias is not None else 0.0 for ts in h_ts]
        parts.append(softmax_sum(asked[cut], keys, values, biases))
    return module.out.weight @ torch.cat(parts)


def tower_logits(towers: TaskTowers, x: list[Tensor], schema: Schema) -> Tensor:
    """One logit per task from all heads."""
    logits = []
    for k in range(len(schema.tasks)):
        hidden = towers.bias[k]
        for n, head in enumerate(x):
            hidden = hidden + rms(head, towers.norm.scale[n]) @ towers.weight[n, :, k]
        logits.append(silu(hidden) @ towers.out[k] + towers.out_bias[k])
    return torch.stack(logits)

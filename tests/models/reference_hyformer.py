"""HyFormer written from the equations alone: one candidate, one token, one event at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from features.batch import RequestBatch
from models.encoders import LongerEncoding, SwiGLUEncoding
from models.hyformer.model import HyFormer, HyFormerLayer
from tests.models.naive import (
    Event,
    after,
    before,
    feed_forward,
    multi_head,
    samples,
    silu,
    swiglu,
    tower_logits,
)
from tests.models.reference_mixformer import split


def hyformer_logits(model: HyFormer, batch: RequestBatch) -> Tensor:
    """Logits [C, K], candidate by candidate."""
    config, scores = model.config, []
    for sample in samples(model, batch, model.align, config.event_time):
        F: list[Tensor] = []  # non-sequential tokens; those of the user's groups come first
        F_item: list[Tensor] = []
        for group, weights in zip(model.groups, model.split, strict=True):
            e = torch.cat([sample.features[one.name] for one in group.features])
            tokens = split(e, weights.project.weight)
            F += tokens
            F_item += [] if all(one.side in ("user", "context") for one in group.features) else tokens
        streams = [[event for one in stream for event in sample.sequences[one.name]] for stream in model.streams]
        F_user = F[: len(F) - len(F_item)]
        pools = [sum(event.s for event in S) / len(S) if S else torch.zeros(config.width).to(F[0]) for S in streams]
        info = {"full": F_user + pools + F_item, "no_pooling": F_user + F_item, "target_only": F_item}[config.query]
        Q = queries(model, torch.cat(info))  # 3.3.2
        for layer in model.layers:
            assert isinstance(layer, HyFormerLayer)
            decoded, start = [], 0
            for stream, count in enumerate(model.queries):
                H = encoding(model, layer, stream, streams[stream])
                module = layer.decode[stream]
                for n in range(count):  # 3.4.2
                    q = before(module.norm, Q[start + n], n)
                    out = multi_head(module.attention, q, sample.ts, [one.s for one in H], [one.ts for one in H])
                    out = out + Q[start + n] if config.attention_residual else out
                    decoded.append(after(module.norm, out, n))
                start += count
            boosted = boost(layer, decoded + F)  # 3.5
            Q = boosted[: len(Q)]
            if config.ns_tokens == "carried":
                F = boosted[len(Q) :]
        scores.append(tower_logits(model.towers, boosted, model.schema))
    return torch.stack(scores)


def queries(model: HyFormer, info: Tensor) -> list[Tensor]:
    generate = model.generate
    weight = torch.cat([generate.user, generate.item], dim=1)  # the user's parts of Global Info come first
    return [silu(info @ weight[n] + generate.bias[n, 0]) @ generate.out.weight[n] for n in range(len(weight))]


def encoding(model: HyFormer, layer: HyFormerLayer, stream: int, S: list[Event]) -> list[Event]:
    """3.4.1 for the visible window of one request."""
    module = layer.encode[stream]
    normed, ts = [before(module.norm, event.s) for event in S], [event.ts for event in S]
    if isinstance(module, SwiGLUEncoding):
        return [Event(after(module.norm, swiglu(module.ffn, x)), t) for x, t in zip(normed, ts, strict=True)]
    if isinstance(module, LongerEncoding):
        chosen = sorted(range(len(S)), key=lambda i: ts[i])[-model.config.short_length :]
    else:
        chosen = list(range(len(S)))
    out = []
    for i in chosen:
        h = multi_head(module.attention, normed[i], ts[i], normed, ts)
        if isinstance(module, LongerEncoding):
            h = after(module.norm, h + S[i].s if model.config.attention_residual else h)
        else:
            h = feed_forward(module.ffn, after(module.norm, h + S[i].s))
        out.append(Event(h, ts[i]))
    return out


def boost(layer: HyFormerLayer, tokens: list[Tensor]) -> list[Tensor]:
    """Q_boost, as many tokens as the layer keeps."""
    module, T = layer.boost, len(tokens)
    normed = [before(module.norm, x, t) for t, x in enumerate(tokens)]
    width = len(tokens[0]) // T
    boosted = []
    for h in range(module.kept.stop):
        mixed = torch.cat([x[h * width : (h + 1) * width] for x in normed])
        boosted.append(after(module.norm, swiglu(module.ffn, mixed, h) + tokens[h], h))
    return boosted

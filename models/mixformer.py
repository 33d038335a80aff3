"""MixFormer and UI-MixFormer (equations of the MixFormer paper, arXiv 2026).

Shape suffixes: N heads (N_U user-side, N_G item-side), D head width, S slice width D / N, R requests,
C candidates, B either of them, U timelines, E events, K tasks.

One class serves both: a MixFormer is the case N_U = 0, whose heads all depend on the candidate. A
UI-MixFormer (section 3.4) computes its user-side heads through every layer once per request.

Where the paper is silent: norms are RMSNorm before each sublayer, per head (width D); FFN hidden widths
are ``ffn`` and ``sequence_ffn`` times D; a task tower is one hidden layer of ``tower`` units. Several
behaviour sequences have their own linear map to N·D and their events share one softmax. Event time enters
by the relative-time bias of the attention (``time_bias``; off is the paper's exact form).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.batch import Items, RequestBatch, Timeline, Users
from features.schema import Schema
from models.inputs import InputLayer
from models.layers import (
    TIME_BUCKETS,
    AttentionGroup,
    PerHeadLinear,
    PerHeadSwiGLU,
    RMSNorm,
    SequenceEvents,
    SwiGLU,
    attend,
    plan_attention,
)


@dataclass(frozen=True)
class MixFormerConfig:
    """Sizes of a MixFormer. ``user_heads``: N_U; 0 is MixFormer, None the paper's rule (section 3.4.1)."""

    heads: int = 8
    head_dim: int = 32
    layers: int = 2
    ffn: float = 2.0
    sequence_ffn: float = 2.0
    tower: int = 64
    user_heads: int | None = None
    time_bias: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.head_dim % self.heads:
            raise ValueError(f"head_dim {self.head_dim} must be divisible by heads {self.heads} (HeadMixing, eq. 3)")


@dataclass
class LayerKeys:
    """Keys and values of one layer for all events, [E, N, D] each (eq. 7)."""

    keys: Tensor
    values: Tensor


@dataclass
class TimelineState:
    """What depends on nothing but the events: layer-wise keys and values, and where the events lie."""

    layers: list[LayerKeys]
    offsets: dict[str, Tensor]
    ts: dict[str, Tensor]


@dataclass
class UserState:
    """What no candidate can change.

    Attributes:
        features: user-side features that every candidate needs, [R, D_U] (N_U = 0), else [R, 0].
        mixed: per layer the user part of the item heads' HeadMixing, [R, N_G, N_U · S].
        tower: user part of the towers' first layer, [R, K, tower].
        timeline_state, users: what the item heads attend to.
    """

    features: Tensor
    mixed: list[Tensor]
    tower: Tensor
    timeline_state: TimelineState
    users: Users


class MixFormerBlock(nn.Module):
    """Query Mixer, Cross Attention and Output Fusion (section 3.3)."""

    def __init__(self, config: MixFormerConfig, user_heads: int) -> None:
        super().__init__()
        N, D = config.heads, config.head_dim
        self.heads, self.user_heads, self.slice_width = N, user_heads, D // N
        self.mix_norm, self.query_norm, self.fusion_norm = RMSNorm(N, D), RMSNorm(N, D), RMSNorm(N, D)
        self.query_ffn = PerHeadSwiGLU(N, D, round(config.ffn * D))
        self.fusion_ffn = PerHeadSwiGLU(N, D, round(config.ffn * D))
        self.sequence_norm = RMSNorm(N * D)
        self.sequence_ffn = SwiGLU(N * D, round(config.sequence_ffn * D))
        self.key, self.value = PerHeadLinear(N, D, D), PerHeadLinear(N, D, D)
        self.time_bias = nn.Parameter(torch.zeros(N, TIME_BUCKETS)) if config.time_bias else None
        self.dropout = nn.Dropout(config.dropout)

    def encode_events(self, s_END: Tensor) -> LayerKeys:
        """Eq. 5–7: h = SwiGLUFFN(Norm(s)) + s, split into heads, projected to keys and values."""
        s = s_END.flatten(1)
        h_END = (self.sequence_ffn(self.sequence_norm(s)) + s).view_as(s_END)  # eq. 5, 6
        return LayerKeys(self.key(h_END), self.value(h_END))  # eq. 7

    def slices(self, x_BND: Tensor, heads: slice, receivers: slice) -> Tensor:
        """What heads ``receivers`` get from these heads in HeadMixing(Norm(X)): [B, receivers, heads · S].

        HeadMixing reshapes [N, D] to [N, N, S] and transposes: head i receives slice i of every head (eq. 3).
        """
        normed: Tensor = self.mix_norm(x_BND, heads).unflatten(-1, (self.heads, self.slice_width))
        return normed[:, :, receivers].transpose(1, 2).flatten(2)

    def fuse(self, p: Tensor, heads: slice, events: LayerKeys, plan: list[AttentionGroup]) -> Tensor:
        """The rest of the block for these heads, from p of eq. 3."""
        bias = self.time_bias[heads] if self.time_bias is not None else None
        q = self.dropout(self.query_ffn(self.query_norm(p, heads), heads)) + p  # eq. 4
        z = self.dropout(attend(q, events.keys[:, heads], events.values[:, heads], plan, bias)) + q  # eq. 8
        o: Tensor = self.dropout(self.fusion_ffn(self.fusion_norm(z, heads), heads)) + z  # eq. 9
        return o


class MixFormer(nn.Module):
    """MixFormer (N_U = 0) and UI-MixFormer (1 ≤ N_U ≤ N − 1).

    Args:
        schema: features in the order of concatenation; context features are user-side.
        config: sizes.
        id_dropout: see :class:`InputLayer`.
    """

    def __init__(self, schema: Schema, config: MixFormerConfig, id_dropout: float = 0.01) -> None:
        super().__init__()
        self.schema, self.config = schema, config
        N, D = config.heads, config.head_dim
        self.user_features, self.item_features = schema.side("user", "context"), schema.side("item")
        user_width = sum(feature.dim for feature in self.user_features)
        item_width = sum(feature.dim for feature in self.item_features)
        if config.user_heads is None:  # N_G = ⌊D_ns^G · N / D_ns⌋, clamped so that both sides have a head
            item_heads = min(max(item_width * N // (user_width + item_width), 1), N - 1)
            self.user_heads = N - item_heads
        else:
            self.user_heads = config.user_heads
        if not 0 <= self.user_heads < N:
            raise ValueError(f"user_heads must lie in 0 … {N - 1}, not {self.user_heads}")
        self.user_side, self.item_side = slice(0, self.user_heads), slice(self.user_heads, N)
        self.inputs = InputLayer(schema, id_dropout)
        if self.user_heads:
            self.user_split = HeadSplit(user_width, self.user_heads, D)
            self.item_split = HeadSplit(item_width, N - self.user_heads, D)
        else:
            self.item_split = HeadSplit(user_width + item_width, N, D)
        self.align = nn.ModuleDict(
            {s.name: nn.Linear(sum(field.dim for field in s.fields), N * D) for s in schema.sequences}
        )
        self.blocks = nn.ModuleList([MixFormerBlock(config, self.user_heads) for _ in range(config.layers)])
        tasks = len(schema.tasks)
        self.tower_norm = RMSNorm(N, D)
        self.tower_in = nn.Parameter(torch.randn(N * D, tasks, config.tower) * (N * D) ** -0.5)
        self.tower_bias = nn.Parameter(torch.zeros(tasks, config.tower))
        self.tower_out = nn.Parameter(torch.randn(tasks, config.tower) * config.tower**-0.5)
        self.output_bias = nn.Parameter(torch.zeros(tasks))

    def forward(self, batch: RequestBatch) -> Tensor:
        """Logits, [C, K]."""
        timeline_state = self.encode_timelines(batch.timelines)
        return self.score(self.encode_users(batch.users, timeline_state), batch.items)

    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        """Layer-wise keys and values of all heads (eq. 5–7), shared by all requests of a timeline."""
        N, D = self.config.heads, self.config.head_dim
        events = []
        for sequence in self.schema.sequences:
            timeline = timelines[sequence.name]
            s = self.inputs.concatenate(sequence.fields, dict(timeline.fields), len(timeline.ts))
            events.append(self.align[sequence.name](s).view(-1, N, D))
        s_END = torch.cat(events) if events else self.output_bias.new_zeros(0, N, D)
        return TimelineState(
            layers=[block.encode_events(s_END) for block in self._blocks()],
            offsets={name: timelines[name].offsets for name in self.align},
            ts={name: timelines[name].ts for name in self.align},
        )

    def encode_users(self, users: Users, timeline_state: TimelineState) -> UserState:
        """User-side heads through every layer, and the user part of every mixing (eq. 10, 11)."""
        R = len(users.ts)
        e_U = self.inputs.concatenate(self.user_features, users.fields, R)
        tower = self.tower_bias.expand(R, -1, -1)
        if not self.user_heads:
            return UserState(e_U, [], tower, timeline_state, users)
        plan = self._plan(users, timeline_state, torch.arange(R, device=users.ts.device))
        x = self.user_split(e_U)
        mixed = []
        for block, events in zip(self._blocks(), timeline_state.layers, strict=True):
            mixed.append(block.slices(x, self.user_side, self.item_side))
            # The mask of eq. 10 zeroes what user heads would receive from item heads.
            own = block.slices(x, self.user_side, self.user_side)
            p = functional.pad(own, (0, self.config.head_dim - own.shape[-1])) + x
            x = block.fuse(p, self.user_side, events, plan)
        tower = tower + self._tower_input(x, self.user_side)
        return UserState(e_U[:, :0], mixed, tower, timeline_state, users)

    def score(self, user_state: UserState, items: Items) -> Tensor:
        """Logits of every candidate, [C, K]."""
        request = items.request
        e = self.inputs.concatenate(self.item_features, items.fields, len(request))
        x = self.item_split(torch.cat([user_state.features[request], e], dim=-1))
        plan = self._plan(user_state.users, user_state.timeline_state, request)
        for layer, (block, events) in enumerate(zip(self._blocks(), user_state.timeline_state.layers, strict=True)):
            mixing = block.slices(x, self.item_side, self.item_side)
            if self.user_heads:
                mixing = torch.cat([user_state.mixed[layer][request], mixing], dim=-1)
            x = block.fuse(mixing + x, self.item_side, events, plan)  # eq. 3
        hidden = functional.silu(user_state.tower[request] + self._tower_input(x, self.item_side))
        return (hidden * self.tower_out).sum(-1) + self.output_bias

    def _blocks(self) -> list[MixFormerBlock]:
        return [block for block in self.blocks if isinstance(block, MixFormerBlock)]

    def _tower_input(self, x_BND: Tensor, heads: slice) -> Tensor:
        weight = self.tower_in.unflatten(0, (self.config.heads, -1))[heads].flatten(0, 1)
        return torch.einsum("bi,ikt->bkt", self.tower_norm(x_BND, heads).flatten(1), weight)

    def _plan(self, users: Users, state: TimelineState, request: Tensor) -> list[AttentionGroup]:
        """Attention plan of queries that belong to these requests, over all sequences together."""
        sequences, start = [], 0
        for sequence in self.schema.sequences:
            end = users.end[sequence.name][request]
            sequences.append(SequenceEvents(state.offsets[sequence.name] + start, end, sequence.length))
            start += len(state.ts[sequence.name])
        event_ts = torch.cat(list(state.ts.values())) if state.ts else users.ts[:0]
        return plan_attention(users.timeline[request], users.ts[request], event_ts, sequences)

    def describe(self) -> dict[str, Any]:
        """What rebuilds this model beside its schema."""
        return asdict(self.config) | {"user_heads": self.user_heads}


class HeadSplit(nn.Module):
    """Eq. 2: the concatenated features, padded to a multiple of the heads, split and projected to width D."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.padding = heads, -width % heads
        self.project = PerHeadLinear(heads, (width + self.padding) // heads, head_dim)

    def forward(self, e: Tensor) -> Tensor:
        padded = functional.pad(e, (0, self.padding))
        x: Tensor = self.project(padded.unflatten(-1, (self.heads, -1)))
        return x

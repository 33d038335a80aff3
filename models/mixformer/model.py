"""MixFormer and UI-MixFormer (section 3 of the MixFormer paper, ByteDance 2026).

Shape suffixes: N heads, of them U user-side (N_U) and G item-side (N_G); D head width, R requests, C candidates,
B either of them, E events, X what a head receives from user heads, K tasks, H hidden width of a tower.

One class serves both: a MixFormer is the case N_U = 0, whose heads all depend on the candidate. A UI-MixFormer
(section 3.4) carries its user-side heads through every layer once per request.

Where the paper is silent, ``MixFormerConfig`` names what was chosen: RMSNorm before each sublayer, per head (width D);
FFN widths; one hidden layer per task tower. Several behaviour sequences have their own linear map to N·D and their
events share one softmax. Event time enters with the event (``event_time``) and by the attention's relative-time bias
(``time_bias``; off is the paper's exact form).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from features.batch import Items, Timeline, Users
from features.schema import Schema
from models.blocks.attention import TIME_BUCKETS, Plan, attend, plan_attention
from models.blocks.dropout import Dropout
from models.blocks.ffn import FeedForward, NoFeedForward, PerHeadSwiGLU, SwiGLU
from models.blocks.heads import HeadSplit, PerHeadLinear
from models.blocks.mixing import HeadMixing, Mixing, NoMixing, SelfAttentionMixing
from models.blocks.norms import NORMS, NoNorm
from models.blocks.towers import TaskTowers
from models.mixformer.config import MixFormerConfig, decoupled_heads
from models.protocol import RankingModel
from models.sizes import width_of
from models.state import EncodedEvents, TimelineState, UserState, compact, requests_along


@dataclass
class MixFormerUserState(UserState):
    """What no candidate can change; the item heads attend to one stream.

    Attributes:
        features: e of the user side, which a MixFormer's heads all need, [R, D_U]; None for a UI-MixFormer.
        received: per layer what the item heads receive from the user heads in the mixing, [·, R, X].
        tower: the user heads' part of the towers' first layer, [R, K, H]; None for a MixFormer.
    """

    features: Tensor | None = field(metadata=requests_along(0))
    received: list[Tensor] = field(metadata=requests_along(1))
    tower: Tensor | None = field(metadata=requests_along(0))


class MixFormerBlock(nn.Module):
    """Query Mixer, Cross Attention and Output Fusion (section 3.3); norms and residuals sit in the sublayers."""

    def __init__(self, config: MixFormerConfig, user_heads: int) -> None:
        super().__init__()
        N, D, hidden = config.heads, config.head_dim, round(config.ffn * config.head_dim)
        self.user_side, self.item_side = slice(0, user_heads), slice(user_heads, N)
        norm, dropout = NORMS[config.norm], config.dropout
        self.mix_norm = NoNorm() if config.mixing == "none" else norm(N, D)
        mixings: dict[str, Callable[[], Mixing]] = {
            "heads": lambda: HeadMixing(N, D, user_heads),
            "self_attention": lambda: SelfAttentionMixing(D, config.mixing_heads),
            "none": NoMixing,
        }
        self.mixing = mixings[config.mixing]()
        self.query = (
            FeedForward(norm(N, D), PerHeadSwiGLU(N, D, hidden), dropout) if config.query_ffn else NoFeedForward()
        )
        self.key, self.value = PerHeadLinear(N, D, D), PerHeadLinear(N, D, D)
        self.time_bias = nn.Parameter(torch.zeros(N, TIME_BUCKETS)) if config.time_bias else None
        fusion = PerHeadSwiGLU(N, D, hidden) if config.fusion_ffn_per_head else SwiGLU(D, hidden)
        self.fusion = FeedForward(norm(N, D), fusion, dropout)
        self.dropout = Dropout(dropout)

    def encode_events(self, h_NED: Tensor) -> tuple[Tensor, ...]:
        """Eq. 7: keys and values of the item heads, which many queries read, [G, E, D].

        User heads have one query per request: (q · W_k) · h costs less than q · (W_k h), so that their h is kept.
        """
        h_UED, h_GED = h_NED.tensor_split([self.user_side.stop])
        return h_UED, self.key(h_GED, self.item_side), self.value(h_GED, self.item_side)

    def user_heads(self, x_URD: Tensor, events: tuple[Tensor, ...], plan: Plan | None) -> tuple[Tensor, Tensor]:
        """The block of the user heads, [U, R, D], and what the item heads receive from them in the mixing."""
        mixed, sent = self.mixing.users(self.mix_norm.before(x_URD, self.user_side))  # eq. 11
        p_URD = self.mix_norm.after(mixed + x_URD, self.user_side)  # eq. 3
        q_URD = self.query(p_URD, self.user_side)  # eq. 4
        h_UED = events[0]
        asked = torch.bmm(q_URD, self.key.weight[self.user_side].transpose(1, 2))  # q · W_k
        summed = attend(asked, h_UED, h_UED, plan, self._bias(self.user_side))
        z_URD = self.dropout(self.value(summed, self.user_side)) + q_URD  # eq. 8
        return self.fusion(z_URD, self.user_side), sent  # eq. 9

    def item_heads(
        self, x_GCD: Tensor, received: Tensor | None, events: tuple[Tensor, ...], plan: Plan | None
    ) -> Tensor:
        """The block of the item heads, [G, C, D]; ``received``: from the user heads, per candidate."""
        mixed = self.mixing.items(self.mix_norm.before(x_GCD, self.item_side), received)
        p_GCD = self.mix_norm.after(mixed + x_GCD, self.item_side)  # eq. 3
        q_GCD = self.query(p_GCD, self.item_side)  # eq. 4
        _, k_GED, v_GED = events
        z_GCD = self.dropout(attend(q_GCD, k_GED, v_GED, plan, self._bias(self.item_side))) + q_GCD  # eq. 8
        o_GCD: Tensor = self.fusion(z_GCD, self.item_side)  # eq. 9
        return o_GCD

    def _bias(self, heads: slice) -> Tensor | None:
        return None if self.time_bias is None else self.time_bias[heads]


class MixFormer(RankingModel):
    """MixFormer (N_U = 0) and UI-MixFormer (1 ≤ N_U ≤ N − 1).

    Args:
        schema: features in the order of concatenation; context features are user-side, cross features item-side.
        config: sizes and switches.
        id_dropout: see :class:`models.inputs.InputLayer`.
    """

    config: MixFormerConfig

    def __init__(self, schema: Schema, config: MixFormerConfig, id_dropout: float = 0.01) -> None:
        N, D = config.heads, config.head_dim
        super().__init__(schema, N * D, config.event_time, id_dropout)
        user_width, item_width = width_of(schema.user_side), width_of(schema.item_side)
        self.user_heads = decoupled_heads(schema, config)
        self.config = config.model_copy(update={"user_heads": self.user_heads})
        self.user_side, self.item_side = slice(0, self.user_heads), slice(self.user_heads, N)
        if self.user_heads:
            self.user_split = HeadSplit(user_width, self.user_heads, D)
            self.item_split = HeadSplit(item_width, N - self.user_heads, D)
        else:
            self.item_split = HeadSplit(user_width + item_width, N, D)
        self.sequence = nn.ModuleList(
            FeedForward(NORMS[config.norm](N * D), SwiGLU(N * D, round(config.sequence_ffn * D)))
            for _ in range(config.layers if config.sequence_ffn_per_layer else 1)
        )
        self.blocks = nn.ModuleList(MixFormerBlock(config, self.user_heads) for _ in range(config.layers))
        self.towers = TaskTowers(N, D, len(schema.tasks), config.tower)

    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        """Layer-wise keys and values (eq. 5–7), shared by all requests of a timeline."""
        events = self.aligned_events(self.schema.sequences, timelines)
        ((s_EX,),) = events.layers
        hidden = [ffn(s_EX).unflatten(-1, (self.config.heads, -1)).transpose(0, 1) for ffn in self.sequence]  # eq. 5, 6
        layers = [block.encode_events(hidden[i % len(hidden)]) for i, block in enumerate(self._blocks())]
        if self.config.sequence_ffn_per_layer or not self.user_heads:  # else h is one for all layers, which share it
            layers = [(compact(h_UED.transpose(0, 1)).transpose(0, 1), k, v) for h_UED, k, v in layers]
        return TimelineState([EncodedEvents(layers, events.ts, events.offsets)])

    def encode_users(self, users: Users, timeline_state: TimelineState) -> MixFormerUserState:
        """User-side heads through every layer, and what item heads receive from them (eq. 10, 11)."""
        stream = timeline_state.events[0].seen(self.schema.sequences, users)
        e_RU = self.inputs.concatenate(self.schema.user_side, users.fields)
        if not self.user_heads:
            return MixFormerUserState([stream], e_RU, [], None)
        x_URD = self.user_split(e_RU)
        plan = plan_attention(stream.seen, None, x_URD.device)
        received = []
        for block, layer in zip(self._blocks(), stream.events.layers, strict=True):
            x_URD, sent = block.user_heads(x_URD, layer, plan)
            received.append(compact(sent))
        return MixFormerUserState([stream], None, received, self.towers.first_layer(x_URD, self.user_side))

    def score(self, user_state: UserState, items: Items) -> Tensor:
        """Logits of every candidate, [C, K]."""
        assert isinstance(user_state, MixFormerUserState)
        (stream,) = user_state.streams
        e_C = self.inputs.concatenate(self.schema.item_side, items.fields)
        request = items.request.to(e_C.device)
        if user_state.features is not None:
            e_C = torch.cat([user_state.features.index_select(0, request), e_C], dim=-1)
        x_GCD = self.item_split(e_C)
        plan = plan_attention(stream.seen, items.offsets.diff(), x_GCD.device)
        received: list[Tensor | None] = [sent.index_select(1, request) for sent in user_state.received]
        received = received or [None] * self.config.layers
        for block, sent, layer in zip(self._blocks(), received, stream.events.layers, strict=True):
            x_GCD = block.item_heads(x_GCD, sent, layer, plan)
        first = self.towers.first_layer(x_GCD, self.item_side)
        if user_state.tower is not None:
            first = first + user_state.tower.index_select(0, request)
        logits: Tensor = self.towers(first)
        return logits

    def _blocks(self) -> list[MixFormerBlock]:
        return [block for block in self.blocks if isinstance(block, MixFormerBlock)]

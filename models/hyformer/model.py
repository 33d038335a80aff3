"""HyFormer (section 3 of the HyFormer paper, ByteDance 2026).

Shape suffixes: T tokens = N query tokens + M non-sequential tokens, of these U user-side and G item-side; D their
width; R requests, C candidates, B either of them, E events, H attention heads, W width of one of them,
F hidden width of the query generation, K tasks.

Every behaviour sequence has query tokens of its own (3.7). What no candidate can change is computed per request:
the user-side tokens, the pooled sequences, their part of the query generation, and an encoding that depends on the
whole visible window (Transformer, LONGER). The SwiGLU encoding depends on nothing but the event and is computed once
per timeline.

Where the paper is silent, ``HyFormerConfig`` names what was chosen: FFN widths, heads, norms, residual of the cross
attention, activations (SwiGLU per token as in MixFormer, SiLU in the query generation). The towers read all T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.batch import Items, Timeline, Users
from features.schema import Schema
from models.blocks.attention import MultiHeadAttention, Plan, Seen, attend, plan_attention
from models.blocks.draws import rows_are
from models.blocks.dropout import Dropout
from models.blocks.ffn import PerHeadSwiGLU
from models.blocks.heads import HeadSplit, PerHeadLinear
from models.blocks.mixing import HeadMixing
from models.blocks.norms import NORMS, Norm
from models.blocks.towers import TaskTowers
from models.encoders import ENCODINGS, EncoderSizes, Window, make_window, window_keys
from models.hyformer.config import HyFormerConfig
from models.hyformer.tokens import query_tokens, sequence_streams, token_groups
from models.protocol import RankingModel
from models.state import EncodedEvents, SeenEvents, TimelineState, UserState, requests_along


@dataclass
class HyFormerUserState(UserState):
    """What no candidate can change; of each stream the layer-wise keys and values, [H, E, W] each.

    Attributes:
        queries: user part of the first layer of the query generation, [N, R, F].
        tokens: user-side non-sequential tokens, [U, R, D].
        features: user-side features that make a token together with item-side ones, [R, dim] each.
    """

    queries: Tensor = field(metadata=requests_along(1))
    tokens: Tensor = field(metadata=requests_along(1))
    features: dict[str, Tensor] = field(metadata=requests_along(0))


class QueryGeneration(nn.Module):
    """Q = [FFN_1(Global Info), …, FFN_N(Global Info)] (3.3.2).

    The first layer of an FFN is linear in the parts of Global Info, so the user's part is computed once per request.
    """

    def __init__(self, queries: int, user_width: int, item_width: int, config: HyFormerConfig) -> None:
        super().__init__()
        D, F = config.width, round(config.query_ffn * config.width)
        scale = (user_width + item_width) ** -0.5
        self.user = nn.Parameter(torch.empty(queries, user_width, F).uniform_(-scale, scale))
        self.item = nn.Parameter(torch.empty(queries, item_width, F).uniform_(-scale, scale))
        self.bias = nn.Parameter(torch.zeros(queries, 1, F))
        self.out = PerHeadLinear(queries, F, D)

    def of_user(self, info_RX: Tensor) -> Tensor:
        return info_RX @ self.user + self.bias

    def forward(self, of_user_NCF: Tensor, info_CX: Tensor) -> Tensor:
        q_NCD: Tensor = self.out(functional.silu(of_user_NCF + info_CX @ self.item))
        return q_NCD


class QueryDecoding(nn.Module):
    """Q̃ = CrossAttn(Q, K, V): the query tokens of one stream over its keys and values (3.4.2)."""

    def __init__(self, queries: int, config: HyFormerConfig) -> None:
        super().__init__()
        self.norm: Norm = NORMS[config.norm](queries, config.width)
        self.attention = MultiHeadAttention(config.width, config.attention_heads, config.time_bias)
        self.dropout, self.residual = Dropout(config.dropout), config.attention_residual

    def forward(self, q_NCD: Tensor, keys_values: tuple[Tensor, ...], plan: Plan | None) -> Tensor:
        asked = self.norm.before(q_NCD).transpose(0, 1).flatten(0, 1)  # the tokens of a candidate side by side
        keys, values = keys_values
        decoded = self.attention(asked, keys, values, plan).unflatten(0, (-1, len(q_NCD))).transpose(0, 1)
        decoded = self.dropout(decoded)
        return self.norm.after(decoded + q_NCD if self.residual else decoded)


class QueryBoosting(nn.Module):
    """Q_boost = Q + PerToken-FFN(token mixing of Q) (3.5), for the first ``kept`` of the T tokens.

    Where only the query tokens reach the next layer, nothing is computed for the others.
    """

    def __init__(self, kept: int, config: HyFormerConfig) -> None:
        super().__init__()
        T, D = config.tokens, config.width
        self.kept = slice(0, kept)
        self.norm: Norm = NORMS[config.norm](T if config.norm == "pre_rms" else kept, D)
        self.mixing = HeadMixing(T, D, 0)
        self.ffn = PerHeadSwiGLU(kept, D, round(config.ffn * D))
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TCD: Tensor) -> Tensor:
        mixed = self.mixing.exchange(self.norm.before(x_TCD), self.kept)
        return self.norm.after(self.dropout(self.ffn(mixed)) + x_TCD[self.kept])


class HyFormerLayer(nn.Module):
    """Query Decoding of every stream, then Query Boosting of all queries with the non-sequential tokens (3.6)."""

    def __init__(self, queries: list[int], kept: int, config: HyFormerConfig) -> None:
        super().__init__()
        sizes = EncoderSizes(
            width=config.width,
            hidden=round(config.sequence_ffn * config.width),
            attention_heads=config.attention_heads,
            norm=config.norm,
            time_bias=config.time_bias,
            dropout=config.dropout,
            residual=config.attention_residual,
        )
        self.encode = nn.ModuleList(ENCODINGS[config.encoding](sizes) for _ in queries)
        self.decode = nn.ModuleList(QueryDecoding(count, config) for count in queries)
        self.boost = QueryBoosting(kept, config)
        self.queries = queries

    def keys_values(self, stream: int, s_ED: Tensor, window: Window | None) -> tuple[Tensor, Tensor]:
        """H = encoding of S; K = H W_K, V = H W_V (3.4.1), [H, E, W] each."""
        decode = self.decode[stream]
        assert isinstance(decode, QueryDecoding)
        return decode.attention.encode(self.encode[stream](s_ED, window))

    def forward(
        self, q_NCD: Tensor, f_MCD: Tensor, keys_values: list[tuple[Tensor, ...]], plans: list[Plan | None]
    ) -> Tensor:
        """Boosted tokens, [kept, C, D]."""
        decoded = [
            decode(q, kv, plan)
            for decode, q, kv, plan in zip(self.decode, q_NCD.split(self.queries), keys_values, plans, strict=True)
        ]
        boosted: Tensor = self.boost(torch.cat([*decoded, f_MCD]))
        return boosted


class HyFormer(RankingModel):
    """HyFormer.

    Args:
        schema: features, sequences and tasks; context features are user-side, cross features item-side.
        config: sizes and switches.
        id_dropout: see :class:`models.inputs.InputLayer`.

    Raises:
        ValueError: fewer tokens than queries and groups need, or names that the schema lacks.
    """

    config: HyFormerConfig

    def __init__(self, schema: Schema, config: HyFormerConfig, id_dropout: float = 0.01) -> None:
        D, tokens = config.width, config.tokens
        super().__init__(schema, D, config.event_time, id_dropout)
        self.config = config
        self.streams = sequence_streams(schema, config)
        self.queries = query_tokens(schema, config)
        N = sum(self.queries)
        self.groups = token_groups(schema, config, tokens - N)
        self.user_tokens = sum(group.tokens for group in self.groups if group.user_side)
        self.split = nn.ModuleList(HeadSplit(group.width, group.tokens, D) for group in self.groups)
        user_width = {
            "full": (self.user_tokens + len(self.streams)) * D,
            "no_pooling": self.user_tokens * D,
            "target_only": 0,
        }[config.query]
        self.generate = QueryGeneration(N, user_width, (tokens - N - self.user_tokens) * D, config)
        last = config.layers - 1
        self.layers = nn.ModuleList(
            HyFormerLayer(self.queries, tokens if config.ns_tokens == "carried" or i == last else N, config)
            for i in range(config.layers)
        )
        self.towers = TaskTowers(tokens, D, len(schema.tasks), config.tower)

    def encode_timelines(self, timelines: Mapping[str, Timeline]) -> TimelineState:
        """Aligned events S and, where the encoding is event by event, layer-wise keys and values."""
        states = []
        for stream, sequences in enumerate(self.streams):
            events = self.aligned_events(sequences, timelines)
            if ENCODINGS[self.config.encoding].local:
                ((s_ED,),) = events.layers
                events.layers += [layer.keys_values(stream, s_ED, None) for layer in self._layers()]
            states.append(events)
        return TimelineState(states)

    def encode_users(self, users: Users, timeline_state: TimelineState) -> HyFormerUserState:
        """User-side tokens, pooled sequences, the user part of the queries, and window-dependent encodings."""
        streams, pools = [], []
        for stream, events in enumerate(timeline_state.events):
            seen = events.seen(self.streams[stream], users).seen
            ((s_ED,), *layers) = events.layers
            if self.config.query == "full":
                pools.append(mean_pool(s_ED, seen))
            encoded = SeenEvents(EncodedEvents(layers, events.ts, events.offsets), seen)
            streams.append(encoded if layers else self._encode_windows(stream, s_ED, seen))
        embedded = {
            feature.name: self.inputs.embed(feature, users.fields[feature.name]) for feature in self.schema.user_side
        }
        tokens = [self._token(index, embedded) for index, group in enumerate(self.groups) if group.user_side]
        R, D = len(users.ts), self.config.width
        f_URD = torch.cat([*tokens, self.towers.norm.scale.new_zeros(0, R, D)])
        info = [f_URD.transpose(0, 1).flatten(1)] if self.config.query != "target_only" else []
        info_RX = torch.cat([*info, *pools, f_URD.new_zeros(R, 0)], dim=-1)
        mixed = [feature.name for group in self.groups if not group.user_side for feature in group.features]
        features = {name: value for name, value in embedded.items() if name in mixed}
        return HyFormerUserState(streams, self.generate.of_user(info_RX), f_URD, features)

    def score(self, user_state: UserState, items: Items) -> Tensor:
        """Logits of every candidate, [C, K]."""
        assert isinstance(user_state, HyFormerUserState)
        device = user_state.tokens.device
        request = items.request.to(device)
        embedded = {
            feature.name: self.inputs.embed(feature, items.fields[feature.name]) for feature in self.schema.item_side
        }
        embedded |= {name: e_RX.index_select(0, request) for name, e_RX in user_state.features.items()}
        tokens = [self._token(index, embedded) for index, group in enumerate(self.groups) if not group.user_side]
        f_GCD = torch.cat(tokens)
        q_NCD = self.generate(user_state.queries.index_select(1, request), f_GCD.transpose(0, 1).flatten(1))
        f_MCD = torch.cat([user_state.tokens.index_select(1, request), f_GCD])
        counts = items.offsets.diff()
        plans = [
            plan_attention(stream.seen, counts * queries, device)
            for stream, queries in zip(user_state.streams, self.queries, strict=True)
        ]
        x_TCD = torch.cat([q_NCD, f_MCD])
        for index, layer in enumerate(self._layers()):
            keys_values = [stream.events.layers[index] for stream in user_state.streams]
            x_TCD = layer(x_TCD[: len(q_NCD)], f_MCD, keys_values, plans)
            if self.config.ns_tokens == "carried":
                f_MCD = x_TCD[len(q_NCD) :]
        logits: Tensor = self.towers(self.towers.first_layer(x_TCD))
        return logits

    def _token(self, group: int, embedded: Mapping[str, Tensor]) -> Tensor:
        """Tokens of one group, [tokens, B, D]."""
        e_BX = torch.cat([embedded[feature.name] for feature in self.groups[group].features], dim=-1)
        tokens: Tensor = self.split[group](e_BX)
        return tokens

    def _encode_windows(self, stream: int, s_ED: Tensor, seen: Seen) -> SeenEvents:
        """Keys and values of every request's own window."""
        newest = self.config.short_length if self.config.encoding == "longer" else None
        window = make_window(seen, newest, s_ED.device)
        s_windows = s_ED.index_select(0, window.rows)
        with rows_are(window_keys(self.streams[stream], window)):
            layers: list[tuple[Tensor, ...]] = [
                layer.keys_values(stream, s_windows, window) for layer in self._layers()
            ]
        window_seen = window.seen  # windows lie one after the other: each begins where the last ended
        return SeenEvents(
            EncodedEvents(layers, window_seen.event_ts, functional.pad(window_seen.last, (1, 0))), window_seen
        )

    def _layers(self) -> list[HyFormerLayer]:
        return [layer for layer in self.layers if isinstance(layer, HyFormerLayer)]


def mean_pool(s_ED: Tensor, seen: Seen) -> Tensor:
    """Mean over what each request sees, [R, D]; zero for an empty window. It is attention whose logits are all zero."""
    plan = plan_attention(seen, None, s_ED.device)
    zero = s_ED.new_zeros(1, len(seen.ts), s_ED.shape[-1])
    return attend(zero, s_ED[None], s_ED[None], plan, None)[0]

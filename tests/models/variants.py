"""Every model and every switch, small enough for a loop-by-loop reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.schema import Schema
from models.hyformer.model import HyFormer
from models.mixformer.model import MixFormer
from models.protocol import RankingModel
from models.registry import MODELS
from tests.models.reference_hyformer import hyformer_logits
from tests.models.reference_mixformer import mixformer_logits

_MIXFORMER = {"heads": 4, "head_dim": 8, "layers": 2, "tower": 7}
_HYFORMER = {"width": 16, "tokens": 8, "layers": 2, "attention_heads": 2, "tower": 7, "short_length": 3}

MODELS_UNDER_TEST: dict[str, dict[str, Any]] = {
    "mixformer": {"name": "mixformer", "user_heads": 0},
    "ui-mixformer": {"name": "ui-mixformer"},
    "hyformer, SwiGLU encoding": {"name": "hyformer"},
    "hyformer, Transformer encoding": {"name": "hyformer", "encoding": "transformer"},
    "hyformer, LONGER encoding": {"name": "hyformer", "encoding": "longer"},
}
"""One of each structure; the properties that serving relies on hold for all of them."""

_PRINTED = {"norm": "none", "attention_residual": False, "time_bias": False, "event_time": False}
VARIANTS: dict[str, dict[str, Any]] = MODELS_UNDER_TEST | {
    "one user head": {"name": "ui-mixformer", "user_heads": 1},
    "three user heads": {"name": "ui-mixformer", "user_heads": 3},
    "a single head": {"name": "mixformer", "user_heads": 0, "heads": 1},
    "mixformer, no times": {"name": "mixformer", "user_heads": 0, "time_bias": False, "event_time": False},
    "ui-mixformer, no times": {"name": "ui-mixformer", "time_bias": False, "event_time": False},
    "without HeadMixing": {"name": "ui-mixformer", "mixing": "none"},
    "mixformer without HeadMixing": {"name": "mixformer", "user_heads": 0, "mixing": "none"},
    "self-attention mixing": {"name": "mixformer", "user_heads": 0, "mixing": "self_attention", "mixing_heads": 2},
    "self-attention mixing, decoupled": {"name": "ui-mixformer", "mixing": "self_attention", "mixing_heads": 2},
    "without query FFN": {"name": "ui-mixformer", "query_ffn": False},
    "one sequence FFN": {"name": "ui-mixformer", "sequence_ffn_per_layer": False},
    "one fusion FFN": {"name": "ui-mixformer", "fusion_ffn_per_head": False},
    "post-LayerNorm": {"name": "ui-mixformer", "norm": "post_layer"},
    "hyformer as printed": {"name": "hyformer"} | _PRINTED,
    "hyformer as printed, LONGER": {"name": "hyformer", "encoding": "longer"} | _PRINTED,
    "hyformer post-LayerNorm": {"name": "hyformer", "encoding": "transformer", "norm": "post_layer"},
    "queries without pooling": {"name": "hyformer", "query": "no_pooling"},
    "queries of the target only": {"name": "hyformer", "query": "target_only"},
    "carried tokens": {"name": "hyformer", "ns_tokens": "carried"},
    "several queries per sequence": {"name": "hyformer", "queries": {"seen": 2, "bought": 1}},
    "merged sequences": {"name": "hyformer", "sequences": "merged"},
    "merged sequences, LONGER": {
        "name": "hyformer",
        "sequences": "merged",
        "encoding": "longer",
        "queries": {"seen": 2, "bought": 1},
    },
    "auto-split": {"name": "hyformer", "tokenization": "auto"},
    "named groups": {
        "name": "hyformer",
        "groups": {"who": ("user_id", "age"), "both": ("device", "item_id"), "tags": ("tags",)},
    },
}


def make_model(
    schema: Schema, variant: str, double: bool = True, std: float = 0.4, layers: int = 2, slices: int = 2
) -> RankingModel:
    """A seeded model in evaluation mode in which every parameter matters: no zero biases, no ones.

    Args:
        slices: width of the slices that heads or tokens exchange.
    """
    torch.manual_seed(0)
    changes = VARIANTS[variant]
    sizes = (
        _HYFORMER | {"width": 8 * slices} if changes["name"] == "hyformer" else _MIXFORMER | {"head_dim": 4 * slices}
    )
    sizes = sizes | {"layers": layers}
    spec = MODELS[changes["name"]]
    model = spec.model(schema, spec.config(**_without_name(sizes | changes)), id_dropout=0.0)
    model = model.double() if double else model
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def reference_logits(model: RankingModel, batch: RequestBatch) -> Tensor:
    """The same model written from the equations alone."""
    if isinstance(model, HyFormer):
        return hyformer_logits(model, batch)
    assert isinstance(model, MixFormer)
    return mixformer_logits(model, batch)


def dense_parameters(model: RankingModel) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.numel() and not name.startswith("inputs.tables")}


def _without_name(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "name"}

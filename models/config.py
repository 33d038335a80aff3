"""Names, sizes and switches of the models; needs no PyTorch, so that a config is checked without loading it.

Where a paper is silent, the value is a key here and its description says what was chosen.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from features.schema import Declaration

NormName = Literal["pre_rms", "post_layer", "none"]


class MixFormerConfig(Declaration):
    """MixFormer and UI-MixFormer. The switches below ``dropout`` are the ablations of the paper's figure 3."""

    heads: int = Field(8, ge=1, description="N")
    head_dim: int = Field(32, ge=1, description="D, divisible by N (HeadMixing)")
    layers: int = Field(2, ge=1, description="L")
    user_heads: int | None = Field(
        None,
        ge=0,
        description="N_U; 0 is MixFormer, left out is the rule of 3.4.1, clamped so that both sides have one",
    )
    ffn: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="hidden width of the per-head FFNs ÷ D; the paper gives none"
    )
    sequence_ffn: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="hidden width of the sequence FFN ÷ D; the paper gives none"
    )
    tower: int = Field(64, ge=1, description="hidden units of a task tower; the paper gives none")
    event_time: bool = Field(True, description="events carry their phase in day and week, beside their fields")
    time_bias: bool = Field(True, description="relative-time attention bias per head; off is the paper's eq. 8")
    dropout: float = Field(0.1, ge=0, lt=1)
    mixing: Literal["heads", "self_attention", "none"] = Field("heads", description="[QM] HeadMixing; HM→SA; wo HM")
    mixing_heads: int = Field(1, ge=1, description="attention heads of HM→SA; the paper gives none")
    query_ffn: bool = Field(True, description="[QM] wo FFN when false")
    sequence_ffn_per_layer: bool = Field(True, description="[CA] PL-FFN→FFN when false: one for all layers")
    fusion_ffn_per_head: bool = Field(True, description="[OF] PFFN→FFN when false: one for all heads")
    norm: Literal["pre_rms", "post_layer"] = Field("pre_rms", description="post_layer: Pre-RN→Post-LN")

    @model_validator(mode="after")
    def _sizes_fit(self) -> MixFormerConfig:
        if self.mixing == "heads" and self.head_dim % self.heads:
            raise ValueError(f"head_dim {self.head_dim} must be divisible by heads {self.heads} (HeadMixing, eq. 3)")
        if self.mixing == "self_attention" and self.head_dim % self.mixing_heads:
            raise ValueError(f"head_dim {self.head_dim} must be divisible by mixing_heads {self.mixing_heads}")
        if self.user_heads is not None and self.user_heads >= self.heads:
            raise ValueError(f"user_heads must lie in 0 … {self.heads - 1}, not {self.user_heads}")
        _hidden_widths(self.head_dim, ffn=self.ffn, sequence_ffn=self.sequence_ffn)
        return self


def _hidden_widths(width: int, **factors: float) -> None:
    for name, factor in factors.items():
        if round(factor * width) < 1:
            raise ValueError(f"{name} {factor} leaves no hidden unit at width {width}")


class HyFormerConfig(Declaration):
    """HyFormer. ``query``, ``sequences`` are the ablations of the paper's table 2."""

    width: int = Field(64, ge=1, description="D, divisible by the tokens (token mixing) and by attention_heads")
    layers: int = Field(2, ge=1, description="L")
    tokens: int = Field(8, ge=2, description="T = N + M: query tokens of all sequences + non-sequential tokens")
    queries: int | dict[str, int] = Field(1, description="query tokens of each stream, or of each sequence by its name")
    tokenization: Literal["semantic", "auto"] = Field("semantic", description="3.3.1: semantic groups or auto-split")
    groups: dict[str, tuple[str, ...]] | None = Field(
        None, description="semantic groups: name → features; default: user, context, item (and cross)"
    )
    query: Literal["full", "no_pooling", "target_only"] = Field("full", description="what the queries are made of")
    ns_tokens: Literal["static", "carried"] = Field(
        "static", description="non-sequential tokens of every layer: as at first (3.6), or as boosted by the one before"
    )
    encoding: Literal["transformer", "longer", "swiglu"] = Field("swiglu", description="3.4.1 (i), (ii), (iii)")
    short_length: int = Field(64, ge=1, description="L_H of the LONGER encoding: the newest events of the window")
    sequences: Literal["separate", "merged"] = Field("separate", description="merged: one stream, shared queries")
    attention_heads: int = Field(4, ge=1, description="heads of every attention; the paper gives none")
    ffn: float = Field(
        2.0, gt=0, allow_inf_nan=False, description="hidden width of the per-token FFNs ÷ D; the paper gives none"
    )
    query_ffn: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="hidden width of the query generation ÷ D; the paper gives none"
    )
    sequence_ffn: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="hidden width of encodings (i) and (iii) ÷ D"
    )
    tower: int = Field(64, ge=1, description="hidden units of a task tower; the paper gives none")
    norm: NormName = Field("pre_rms", description="norm of every sublayer; none: the equations as printed")
    attention_residual: bool = Field(True, description="q + CrossAttn(q, K, V), as in a Transformer; off: as printed")
    event_time: bool = Field(True, description="events carry their phase in day and week, beside their fields")
    time_bias: bool = Field(True, description="relative-time attention bias per head; off in the paper")
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> HyFormerConfig:
        for parts, what in ((self.tokens, "tokens (token mixing, 3.5)"), (self.attention_heads, "attention_heads")):
            if self.width % parts:
                raise ValueError(f"width {self.width} must be divisible by the {parts} {what}")
        _hidden_widths(self.width, ffn=self.ffn, query_ffn=self.query_ffn, sequence_ffn=self.sequence_ffn)
        if self.query == "target_only" and self.tokenization == "auto":
            raise ValueError(
                "query: target_only needs tokenization: semantic; auto-split tells no target from the rest"
            )
        return self


AnyConfig = MixFormerConfig | HyFormerConfig

MODELS: dict[str, tuple[type[MixFormerConfig] | type[HyFormerConfig], dict[str, Any]]] = {
    "mixformer": (MixFormerConfig, {"user_heads": 0}),
    "ui-mixformer": (MixFormerConfig, {}),
    "hyformer": (HyFormerConfig, {}),
}
"""Name of a model → its config and what the name fixes."""

# The papers' exact form has no relative-time bias; FFN widths, which they do not give, meet their parameter counts.
_SMALL = {"heads": 16, "head_dim": 384, "layers": 4, "ffn": 4, "sequence_ffn": 1, "tower": 128}
_MEDIUM = {"heads": 16, "head_dim": 768, "layers": 4, "ffn": 4, "sequence_ffn": 2, "tower": 128}
_PAPER = {"time_bias": False, "dropout": 0.0}
_MIXFORMER: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 8, "head_dim": 32, "layers": 2, "tower": 64},
    "base": {"heads": 16, "head_dim": 64, "layers": 4, "tower": 128},
    "small": _SMALL | _PAPER,
    "medium": _MEDIUM | _PAPER,
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "mixformer": _MIXFORMER,
    "ui-mixformer": _MIXFORMER,
    "hyformer": {
        "tiny": {"width": 64, "layers": 2, "tokens": 8, "tower": 64},
        "base": {"width": 160, "layers": 4, "tokens": 16, "attention_heads": 4, "tower": 128},
        # 13 non-sequential and 3 global tokens (4.1.4)
        "paper": _PAPER
        | {"width": 960, "layers": 4, "tokens": 16, "attention_heads": 16, "ffn": 4, "tower": 128}
        | {"encoding": "longer", "short_length": 100, "attention_residual": False},
    },
}
"""Sizes per model. mixformer small: D is the paper's 386 made divisible by its 16 heads."""


def model_config(name: str, preset: str, overrides: dict[str, Any] | None = None) -> AnyConfig:
    """Sizes and switches of a model.

    Raises:
        ValueError: the model has no such preset, or (pydantic's) a key or value is not allowed.
    """
    kind, fixed = MODELS[name]
    if preset not in PRESETS[name]:
        raise ValueError(f"{name} has no preset {preset!r}; there are {', '.join(PRESETS[name])}")
    overrides = overrides or {}
    for key, value in fixed.items():
        if overrides.get(key, value) != value:
            raise ValueError(f"{name} has {key} = {value}, not {overrides[key]}; another model has that to choose")
    return kind(**{**PRESETS[name][preset], **overrides, **fixed})


def find_preset(text: str) -> tuple[str, str]:
    """Model and preset of a name like ``mixformer-medium``; a model alone has the paper's size, a size alone is UI's.

    Raises:
        ValueError: lists what there is.
    """
    if text in PRESETS["ui-mixformer"]:
        return "ui-mixformer", text
    for name in sorted(PRESETS, key=len, reverse=True):
        if text == name and "paper" in PRESETS[name]:
            return name, "paper"
        if text.startswith(f"{name}-") and text.removeprefix(f"{name}-") in PRESETS[name]:
            return name, text.removeprefix(f"{name}-")
    raise ValueError(f"there is no preset {text!r}; there are {', '.join(preset_names())}")


def preset_names() -> list[str]:
    """Every preset by its full name; ``hyformer`` alone is the paper's."""
    return [f"{name}-{size}".removesuffix("-paper") for name, sizes in PRESETS.items() for size in sizes]

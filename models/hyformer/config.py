"""Sizes and switches of HyFormer; needs no PyTorch, so that a config is checked without loading it.

Where the paper is silent, the value is a key here and its description says what was chosen.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from features.schema import Declaration
from models.sizes import require_hidden_units


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
    norm: Literal["pre_rms", "post_layer", "none"] = Field(
        "pre_rms", description="norm of every sublayer; none: the equations as printed"
    )
    attention_residual: bool = Field(True, description="q + CrossAttn(q, K, V), as in a Transformer; off: as printed")
    event_time: bool = Field(True, description="events carry their phase in day and week, beside their fields")
    time_bias: bool = Field(True, description="relative-time attention bias per head; off in the paper")
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _sizes_fit(self) -> HyFormerConfig:
        for parts, what in ((self.tokens, "tokens (token mixing, 3.5)"), (self.attention_heads, "attention_heads")):
            if self.width % parts:
                raise ValueError(f"width {self.width} must be divisible by the {parts} {what}")
        require_hidden_units(self.width, ffn=self.ffn, query_ffn=self.query_ffn, sequence_ffn=self.sequence_ffn)
        if self.query == "target_only" and self.tokenization == "auto":
            raise ValueError(
                "query: target_only needs tokenization: semantic; auto-split tells no target from the rest"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"width": 64, "layers": 2, "tokens": 8, "tower": 64},
    "base": {"width": 160, "layers": 4, "tokens": 16, "attention_heads": 4, "tower": 128},
    # 13 non-sequential and 3 global tokens (4.1.4), no relative-time bias; FFN widths meet the count of parameters
    "paper": {"width": 960, "layers": 4, "tokens": 16, "attention_heads": 16, "ffn": 4, "tower": 128}
    | {"time_bias": False, "dropout": 0.0}
    | {"encoding": "longer", "short_length": 100, "attention_residual": False},
}
"""Sizes by name."""

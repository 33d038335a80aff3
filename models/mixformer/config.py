"""Sizes and switches of MixFormer and UI-MixFormer; needs no PyTorch, so that a config is checked without loading it.

Where the paper is silent, the value is a key here and its description says what was chosen.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from features.schema import Declaration, Schema
from models.sizes import require_hidden_units, width_of


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
        require_hidden_units(self.head_dim, ffn=self.ffn, sequence_ffn=self.sequence_ffn)
        return self


def decoupled_heads(schema: Schema, config: MixFormerConfig) -> int:
    """N_U: as configured, else N − N_G with N_G = ⌊D_ns^G · N / D_ns⌋ (3.4.1), both sides having at least one."""
    if config.user_heads is not None:
        return config.user_heads
    N = config.heads
    if N < 2:
        raise ValueError("a ui-mixformer needs at least 2 heads, one for each side")
    item_width = width_of(schema.item_side)
    return N - min(max(item_width * N // width_of(schema.features), 1), N - 1)


# The paper's exact form has no relative-time bias; FFN widths, which it does not give, meet its parameter counts.
_PAPER = {"heads": 16, "layers": 4, "ffn": 4, "tower": 128, "time_bias": False, "dropout": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"heads": 8, "head_dim": 32, "layers": 2, "tower": 64},
    "base": {"heads": 16, "head_dim": 64, "layers": 4, "tower": 128},
    "small": _PAPER | {"head_dim": 384, "sequence_ffn": 1},
    "medium": _PAPER | {"head_dim": 768, "sequence_ffn": 2},
}
"""Sizes by name. small: D is the paper's 386 made divisible by its 16 heads."""

"""What an encoder is built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes and switches of one encoder; each takes what it needs.

    Attributes:
        width: D of the events.
        hidden: width of its FFN.
        norm: key of ``NORMS``.
        time_bias: relative-time bias per attention head.
        residual: whether a cross attention has one.
    """

    width: int
    hidden: int
    attention_heads: int
    norm: str
    time_bias: bool
    dropout: float
    residual: bool

"""Attention of packed queries over packed events."""

from models.blocks.attention.kernels import attend
from models.blocks.attention.multihead import MultiHeadAttention
from models.blocks.attention.observed import observed_weights
from models.blocks.attention.plan import TIME_BUCKETS, Plan, Seen, plan_attention, positions

__all__ = [
    "TIME_BUCKETS",
    "MultiHeadAttention",
    "Plan",
    "Seen",
    "attend",
    "observed_weights",
    "plan_attention",
    "positions",
]

"""Fused operations: what a training step needs less time and memory for, each with its plain form beside it."""

from graftlm.kernels.attention import blocked_attention, plain_attention
from graftlm.kernels.bottom import FrozenBottom, bottom_of
from graftlm.kernels.feedforward import Map, feed_forward, plain_feed_forward
from graftlm.kernels.fusing import RECOMPUTE, Fused, Recompute, fuse, given_back_bytes
from graftlm.kernels.head import IGNORED, LossHead, with_states
from graftlm.kernels.linear import low_rank_linear, plain_low_rank_linear
from graftlm.kernels.native import giving_back

__all__ = [
    "IGNORED", "RECOMPUTE", "FrozenBottom", "Fused", "LossHead", "Map", "Recompute", "blocked_attention", "bottom_of",
    "feed_forward", "fuse", "given_back_bytes", "giving_back", "low_rank_linear", "plain_attention",
    "plain_feed_forward", "plain_low_rank_linear", "with_states",
]  # fmt: skip

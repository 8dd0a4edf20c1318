"""Attention over a flat batch: each segment of queries sees its own keys, and no mask of T×T exists."""

from postil.kernels.attention.op import attention

__all__ = ["attention"]

"""Cross entropy of the target tokens through the head, in chunks: no [tokens × vocabulary] tensor exists."""

from postil.kernels.loss.op import cross_entropy

__all__ = ["cross_entropy"]

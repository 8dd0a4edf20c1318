"""Cross entropy and KL divergence through the head, in chunks: no [tokens × vocabulary] tensor exists."""

from postil.kernels.loss.kl import kl_divergence
from postil.kernels.loss.op import cross_entropy

__all__ = ["cross_entropy", "kl_divergence"]

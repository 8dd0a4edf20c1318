"""Products with a dense frozen weight, in float32 where a processor multiplies 16 bits slowly."""

from postil.kernels.dense.op import instructions, matmul, matmul_t, memory_apart, multiplies, widens

__all__ = ["instructions", "matmul", "matmul_t", "memory_apart", "multiplies", "widens"]

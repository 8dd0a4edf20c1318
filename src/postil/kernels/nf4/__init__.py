"""NF4: a weight in 4-bit codes with a scale a block, and its products without the whole matrix in memory."""

from postil.kernels.nf4.op import (
    Nf4Weight,
    dequantise,
    dequantise_rows,
    matmul,
    matmul_t,
    quantise,
)

__all__ = ["Nf4Weight", "dequantise", "dequantise_rows", "matmul", "matmul_t", "quantise"]

"""The one op: a frozen linear map and, for the rows of each span, its adapter's low-rank term."""

from postil.kernels.adapted_linear.op import AdapterSlot, Group, Projection, adapted_linear

__all__ = ["AdapterSlot", "Group", "Projection", "adapted_linear"]

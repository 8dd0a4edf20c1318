"""KeyValueStore: the keys and values of running sequences, one evenly spaced cache slot each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int

from postil.errors import InternalError

ROUND = 64  # capacities are multiples of this


class KeyValueStore:
    """Per layer keys and values [slots·capacity, kv_heads, head_dim] in the model's dtype.

    Slot n holds one sequence in rows n·capacity and on. Before a forward pass, `reserve` makes room and
    `write_rows` says where the pass's tokens go; the layers then call `extend`. Shapes, dtype and device
    are those of the first call. Rows that no token has written are zeros or another sequence's: always finite.
    """

    def __init__(self, slots: int, limit: int) -> None:
        """slots: the most sequences at once; limit: the longest sequence that will ever come, in tokens."""
        self.slots = slots
        self.limit = limit
        self.capacity = 0
        self.write_rows: Int[torch.Tensor, " tokens"] | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, tokens: int, used: Sequence[int]) -> None:
        """Room for sequences of `tokens` tokens; `used[n]` rows of slot n are kept."""
        if tokens <= self.capacity:
            return
        if tokens > self.limit:
            raise InternalError(f"a sequence of {tokens} tokens came where {self.limit} was the longest")
        rounded = -(-max(tokens, self.capacity * 2) // ROUND) * ROUND
        before, self.capacity = self.capacity, max(tokens, min(rounded, self.limit))
        for layer, pair in self._layers.items():
            grown = tuple(part.new_zeros(self.slots * self.capacity, *part.shape[1:]) for part in pair)
            for old, new in zip(pair, grown, strict=True):
                for slot, rows in enumerate(used):
                    new[slot * self.capacity :][:rows] = old[slot * before :][:rows]
            self._layers[layer] = (grown[0], grown[1])

    def extend(
        self,
        layer: int,
        keys: Float[torch.Tensor, "tokens kv_heads head_dim"],
        values: Float[torch.Tensor, "tokens kv_heads head_dim"],
    ) -> tuple[Float[torch.Tensor, "rows kv_heads head_dim"], Float[torch.Tensor, "rows kv_heads head_dim"]]:
        """Store this pass's keys and values at `write_rows`; return all rows of the layer."""
        if self.write_rows is None:
            raise InternalError("the key-value store was not told where this pass's rows go")
        if layer not in self._layers:
            rows = self.slots * self.capacity
            self._layers[layer] = (keys.new_zeros(rows, *keys.shape[1:]), values.new_zeros(rows, *values.shape[1:]))
        stored_keys, stored_values = self._layers[layer]
        stored_keys.index_copy_(0, self.write_rows, keys)
        stored_values.index_copy_(0, self.write_rows, values)
        return stored_keys, stored_values

    def arrange(self, sources: Sequence[int], longest: int) -> None:
        """Slot n becomes what slot sources[n] was, its first `longest` rows; other slots are free."""
        moved = [(slot, source) for slot, source in enumerate(sources) if slot != source]
        if not moved:
            return
        for pair in self._layers.values():
            for part in pair:
                view = part.view(self.slots, self.capacity, *part.shape[1:])
                kept = [view[source, :longest].clone() for _, source in moved]
                for (slot, _), rows in zip(moved, kept, strict=True):
                    view[slot, :longest] = rows

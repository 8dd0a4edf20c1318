"""KeyValueStore: the keys and values of running sequences, each in a run of rows as long as it needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int

from postil.errors import InternalError

ROUND = 64  # a sequence's rows are a multiple of this


class KeyValueStore:
    """Per layer keys and values [rows, kv_heads, head_dim] in the model's dtype.

    Sequence n has the rows `starts[n]` .. `starts[n] + rooms[n]`; what it has not written there may be anything,
    another sequence's values or fresh memory, and counts for nothing. A room is at most twice what its sequence
    holds (rounded up), and all rows at most a quarter more than the rooms that were needed at once.
    Before a forward pass, `reserve` makes room and `write_rows` says where the pass's tokens go; the layers then
    call `extend`. Shapes, dtype and device are those of the first call.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.starts: list[int] = []
        self.rooms: list[int] = []
        self.write_rows: Int[torch.Tensor, " tokens"] | None = None
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, used: Sequence[int], needed: Sequence[int], limits: Sequence[int]) -> None:
        """Room for needed[n] rows of sequence n, of which the first used[n] are kept; it will never need more than
        limits[n]. Sequences that are not there yet come last."""
        rooms = [*self.rooms, *[0] * (len(needed) - len(self.rooms))]
        wanted = [
            room if need <= room else _rounded(need, room, limit)
            for room, need, limit in zip(rooms, needed, limits, strict=True)
        ]
        moved = [n for n, (room, want) in enumerate(zip(rooms, wanted, strict=True)) if want > room]
        if not moved:
            return
        starts = _placed(self.starts, rooms, wanted, moved, self.rows)
        before = self.starts
        self.rooms = wanted
        if starts is not None:
            self.starts = starts
            self._move(before, [(n, used[n]) for n in moved if n < len(before)], fresh=False)
            return
        total = sum(wanted)
        self.rows = max(self.rows, total + total // 4)
        self.starts = [sum(wanted[:n]) for n in range(len(wanted))]
        self._move(before, [(n, used[n]) for n in range(len(before))], fresh=True)

    def keep(self, sequences: Sequence[int]) -> None:
        """Sequence n becomes what sequences[n] was; the rows of the others are free. Nothing is moved."""
        self.starts = [self.starts[n] for n in sequences]
        self.rooms = [self.rooms[n] for n in sequences]

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
            self._layers[layer] = (
                keys.new_empty(self.rows, *keys.shape[1:]),
                values.new_empty(self.rows, *values.shape[1:]),
            )
        stored_keys, stored_values = self._layers[layer]
        stored_keys.index_copy_(0, self.write_rows, keys)
        stored_values.index_copy_(0, self.write_rows, values)
        return stored_keys, stored_values

    def _move(self, before: Sequence[int], sequences: Sequence[tuple[int, int]], *, fresh: bool) -> None:
        """Copy the first rows of each (sequence, rows) from its start `before`; fresh: into new memory."""
        for layer, pair in self._layers.items():
            made = tuple(part.new_empty(self.rows, *part.shape[1:]) if fresh else part for part in pair)
            for old, new in zip(pair, made, strict=True):
                for n, rows in sequences:
                    new[self.starts[n] :][:rows] = old[before[n] :][:rows]
            self._layers[layer] = (made[0], made[1])


def _rounded(need: int, room: int, limit: int) -> int:
    if need > limit:
        raise InternalError(f"a sequence of {need} tokens came where {limit} was its limit")
    return -(-min(max(need, 2 * room), limit) // ROUND) * ROUND


def _placed(
    starts: Sequence[int], rooms: Sequence[int], wanted: Sequence[int], moved: Sequence[int], rows: int
) -> list[int] | None:
    """Starts with the moved sequences in gaps between all others, their own old rooms among these; None: no gap."""
    taken = sorted((start, start + room) for start, room in zip(starts, rooms, strict=False))
    found = [*starts, *[0] * (len(wanted) - len(starts))]
    for n in moved:
        end = 0
        for place, (first, last) in enumerate([*taken, (rows, rows)]):
            if first - end >= wanted[n]:
                taken.insert(place, (end, end + wanted[n]))
                found[n] = end
                break
            end = max(end, last)
        else:
            return None
    return found

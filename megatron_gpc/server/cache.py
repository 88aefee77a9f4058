"""The key-value cache of a batch whose sequences come and go.

One buffer a layer, [rows, heads, columns, head size]: a row is a sequence, a column is a moment.
Rows are right-aligned: the newest token of every sequence stands in the same column, so a decode
step writes one column of all rows, whatever the sequences' lengths:

    row 0    . . a b c d e        start 2
    row 1    . . . . p q r        start 4       . = left of the sequence, masked
    row 2    x y z x y z x        start 0

Nothing is padded or concatenated from step to step.  The last rows move over finished ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class _Window:
    """Which part of the buffers the next forward pass writes and reads."""

    rows: slice
    first: int
    """First column that is read."""
    write: int
    """First column that is written."""
    end: int
    """One past the last column that is written and read."""


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, seen by the model through the window that all layers share."""

    # Tensors, once there are any; the base class has them None before.
    keys: Any
    values: Any

    def __init__(self, cache: RowCache):
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not uninitialised memory: a masked NaN would still spoil the weighted sum.
        shape = self._cache.capacity
        self.keys, self.values = (
            new.new_zeros(shape[0], new.shape[1], shape[1], new.shape[3])
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        w = self._cache.window
        self.keys[w.rows, :, w.write : w.end] = key_states
        self.values[w.rows, :, w.write : w.end] = value_states
        return self.keys[w.rows, :, w.first : w.end], self.values[w.rows, :, w.first : w.end]

    def get_seq_length(self) -> int:
        return self._cache.window.write - self._cache.window.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.window.end - self._cache.window.first, 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """Cache of `rows` running sequences; row i belongs to the generator's i-th running sequence."""

    def __init__(self, num_layers: int):
        self.own_layers = [_Layer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self.own_layers))
        self.clear()

    def clear(self) -> None:
        """Forget all rows and give the memory back."""
        self.rows = 0
        self.column = 0
        """Where the next token of every row is written."""
        self.capacity = (0, 0)
        self._start = np.zeros(0, dtype=np.int64)
        self.window = _Window(slice(0, 0), 0, 0, 0)
        for layer in self.own_layers:
            layer.keys = layer.values = torch.empty(0)
            layer.is_initialized = False

    def open_prefill(self, lengths: Sequence[int], copies: int) -> None:
        """Add rows for new sequences; the next forward pass fills them.

        Args:
            lengths: tokens of each new sequence; the pass takes [len(lengths), max(lengths)] ids,
                left-padded.
            copies: rows that `replicate` will make of them, at least len(lengths).
        """
        longest = max(lengths)
        if self.rows == 0:
            self.column = 0
        self._trim()
        self._reserve(self.rows + copies, max(longest, self.column) + 1)
        if self.column < longest:
            self._move_columns(longest - self.column)
        new = slice(self.rows, self.rows + len(lengths))
        self._start[new] = self.column - np.asarray(lengths)
        self.window = _Window(new, self.column - longest, self.column - longest, self.column)

    def replicate(self, sources: Sequence[int]) -> None:
        """Make len(sources) rows of the rows just filled: new row i is a copy of row sources[i]."""
        base, count = self.rows, len(sources)
        self.rows += count
        if list(sources) == list(range(count)):
            return
        w, index = self.window, base + np.asarray(sources)
        self._start[base : self.rows] = self._start[index]
        for layer in self.own_layers:
            for buffer in (layer.keys, layer.values):
                filled = buffer[:, :, w.write : w.end]
                filled[base : self.rows] = filled[index]

    def open_step(self) -> None:
        """Add a column; the next forward pass, with [rows, 1] ids, fills it."""
        self._trim()
        self._reserve(self.rows, self.column + 1)
        self.window = _Window(
            slice(0, self.rows), int(self._start[: self.rows].min()), self.column, self.column + 1
        )
        self.column += 1

    def mask(self) -> torch.Tensor:
        """[window rows, window columns] bool: which columns belong to the row's sequence."""
        w = self.window
        return torch.from_numpy(np.arange(w.first, w.end) >= self._start[w.rows, None])

    def positions(self) -> torch.Tensor:
        """[window rows, written columns] int64: position in the sequence; 0 left of it."""
        w = self.window
        positions = np.arange(w.write, w.end) - self._start[w.rows, None]
        return torch.from_numpy(np.maximum(positions, 0))

    def keep(self, alive: Sequence[int]) -> list[int]:
        """Drop all rows but `alive` (ascending).

        Returns:
            For each remaining row its number before: the last rows have moved into the gaps.
        """
        count = len(alive)
        order = [row for row in alive if row < count]
        movers = [row for row in alive if row >= count]
        gaps = sorted(set(range(count)) - set(order))
        remaining = list(range(count))
        for gap, mover in zip(gaps, movers, strict=True):
            remaining[gap] = mover
        if gaps:
            self._start[gaps] = self._start[movers]
            first = int(self._start[:count].min())
            for layer in self.own_layers:
                for buffer in (layer.keys, layer.values):
                    used = buffer[:, :, first : self.column]
                    used[gaps] = used[movers]
        self.rows = count
        return remaining

    def _trim(self) -> None:
        """Move everything left once half of the columns are used by no row any more."""
        unused = int(self._start[: self.rows].min()) if self.rows else 0
        if unused >= max(self.capacity[1] // 2, 1):
            self._move_columns(-unused)

    def _reserve(self, rows: int, columns: int) -> None:
        """Make the buffers at least so large; they grow by doubling."""
        row_capacity, column_capacity = self.capacity
        if rows <= row_capacity and columns <= column_capacity:
            return
        if rows > row_capacity:
            row_capacity = max(rows, 2 * row_capacity)
        if columns > column_capacity:
            column_capacity = max(columns, 2 * column_capacity, 32)
        self.capacity = (row_capacity, column_capacity)
        self._start = np.concatenate(
            [self._start, np.zeros(row_capacity - len(self._start), dtype=np.int64)]
        )
        for layer in self.own_layers:
            if layer.is_initialized:
                layer.keys = self._grown(layer.keys)
                layer.values = self._grown(layer.values)

    def _grown(self, buffer: torch.Tensor) -> torch.Tensor:
        rows, columns = self.capacity
        grown = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])
        grown[: self.rows, :, : self.column] = buffer[: self.rows, :, : self.column]
        return grown

    def _move_columns(self, by: int) -> None:
        """Move every row's tokens `by` columns to the right (left if negative)."""
        first = int(self._start[: self.rows].min()) if self.rows else self.column
        for layer in self.own_layers:
            if layer.is_initialized and first < self.column:
                for buffer in (layer.keys, layer.values):
                    used = buffer[: self.rows, :, first : self.column].clone()
                    buffer[: self.rows, :, first + by : self.column + by] = used
        self._start[: self.rows] += by
        self.column += by

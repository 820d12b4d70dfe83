"""Keys and values of one sequence, kept while it is generated."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingTensor:
    """Rows `[n, heads, width]` appended in place; capacity doubles, so n appends copy O(n) rows."""

    def __init__(self) -> None:
        self._storage: Tensor | None = None
        self.length = 0

    @property
    def rows(self) -> Tensor:
        assert self._storage is not None, "read before the first append"
        return self._storage[: self.length]

    def append(self, rows: Tensor) -> None:
        needed = self.length + rows.shape[0]
        if self._storage is None or needed > self._storage.shape[0]:
            grown = rows.new_empty(max(needed, 2 * self.length, 64), *rows.shape[1:])
            if self._storage is not None:
                grown[: self.length] = self.rows
            self._storage = grown
        self._storage[self.length : needed] = rows
        self.length = needed

    def drop(self, count: int) -> None:
        """Forget the first `count` rows and their memory."""
        if count:
            self._storage = self.rows[count:].clone()
            self.length -= count

    @property
    def nbytes(self) -> int:
        return 0 if self._storage is None else self._storage.nbytes


class LayerCache:
    """One layer's rows by name (`k_slc`, `v_slc`, …), created at the first append."""

    def __init__(self) -> None:
        self._tensors: dict[str, GrowingTensor] = {}

    def append(self, name: str, rows: Tensor) -> Tensor:
        """Add rows and return all of `name` so far, `[n, heads, width]`."""
        tensor = self._tensors.setdefault(name, GrowingTensor())
        tensor.append(rows)
        return tensor.rows

    def drop(self, name: str, count: int) -> None:
        """Forget the first `count` rows of `name`."""
        self._tensors[name].drop(count)

    def length(self, name: str) -> int:
        return self._tensors[name].length if name in self._tensors else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())


class KVCache:
    """The caches of all layers of one sequence. `model(tokens, cache=cache)` appends and attends everything before.

    Each layer keeps the selected and the window branch's keys and values, the compressed ones, and the raw keys and values that
    compressed blocks are still to be made of; a dense layer keeps one pair.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.max_length = max_length
        self.length = 0

    def advance(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more. Raises `ValueError` where the sequence would outgrow the model's positions."""
        if self.length + num_tokens > self.max_length:
            raise ValueError(
                f"the sequence would grow to {self.length + num_tokens} tokens, past max_position_embeddings={self.max_length}; "
                "shorten the prompt or generate fewer tokens"
            )
        self.length += num_tokens

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


def visible_tail(length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of one sequence of `length` tokens."""
    return torch.tensor([0, length], dtype=torch.int32, device=device)

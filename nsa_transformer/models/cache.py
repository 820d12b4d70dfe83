"""Keys and values of many sequences, kept while they are generated.

`KVCache` knows lengths and pages, the same for all layers; each layer has its own store for them. A sequence is extended by a chunk of tokens
(`extend`, `model(tokens, cache=…)`), or all sequences by one token each (`step`, `model.decode(tokens, cache)`), which has fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.config import KVCacheConfig, ModelConfig, NSAConfig
from nsa_transformer.kernels.decode import append_rows
from nsa_transformer.kernels.paged import SCALE, NewRows, PagedKeysValues, gather_pages, page_rows, page_tokens, quantize_rows, recent_tokens, ring_tokens
from nsa_transformer.models.cache_size import dense_capacity

# φ of whole blocks: keys and values [N, l, Hkv, …], index of each block [N], to compressed and rotated [N, Hkv, …]
Compress = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def num_compressed(length: int, config: NSAConfig) -> int:
    return max(0, (length - config.compress_block) // config.compress_stride + 1)


class KVCache:
    """The caches of all layers of `num_sequences` sequences. Memory is taken page by page, at the first token's dtype and device.

    `settings.quantization="fp8"`: selection blocks older than the newest `settings.threshold` tokens are kept in e4m3 (sparse attention alone).
    """

    def __init__(self, config: ModelConfig, num_sequences: int = 1, settings: KVCacheConfig | None = None) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences={num_sequences} must be at least 1")
        self.config, self.settings = config, settings or KVCacheConfig()
        self.quantized = self.settings.quantization == "fp8"
        if self.quantized and config.attention != "nsa":
            raise ValueError(f"memory.kv_cache.quantization=fp8 is for model.attention=nsa, not {config.attention}; write memory.kv_cache.quantization=none")
        self.lengths = [0] * num_sequences
        self.span = page_tokens(config.nsa)
        self._pages: list[list[int]] = [[] for _ in range(num_sequences)]
        self._users = [1]  # of each page; page 0 belongs to nobody and takes what is written for no sequence
        self._unused: list[int] = []
        self.device_lengths: Tensor | None = None
        self.table: Tensor | None = None
        self.moves = 0  # how often some tensor of the cache was replaced by a larger one
        self._room = (0, 0)  # pages and longest sequence that all layers have room for
        self.layers = [SparseLayerCache(self) if config.attention == "nsa" else DenseLayerCache(self) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens of the first sequence."""
        return self.lengths[0]

    @property
    def num_pages(self) -> int:
        return len(self._users)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def extend(self, sequence: int, num_tokens: int, device: torch.device) -> int:
        """Make room for `num_tokens` more and return how many there were. Raises `ValueError` where the sequence would outgrow the model's positions."""
        if not 0 <= sequence < len(self.lengths):
            raise ValueError(f"sequence={sequence} is not in the cache; write 0 … {len(self.lengths) - 1}")
        start = self.lengths[sequence]
        self._check_room(start + num_tokens)
        self._place(device)
        self._grow(sequence, start + num_tokens)
        return start

    def reserve_step(self, device: torch.device) -> None:
        """Make room for one more token of every sequence that has any: what the host does of a step. `count_step` is the device's part."""
        self._check_room(max(self.lengths) + 1)
        self._place(device)
        for sequence, length in enumerate(self.lengths):
            if length:
                self._grow(sequence, length + 1, on_device=False)
        room = (self.num_pages, dense_capacity(max(self.lengths)))
        if room != self._room:
            for layer in self.layers:
                layer.make_room()
            self._room = room

    def count_step(self) -> Tensor:
        """The lengths, int32 [B] on the device, with the new tokens."""
        assert self.device_lengths is not None
        self.device_lengths += self.device_lengths > 0
        return self.device_lengths

    def step_kind(self) -> tuple[bool, int]:
        """What a recorded step depends on, after `reserve_step`: whether it compresses, and `moves`. One that was recorded under equal values can be
        replayed."""
        return self.compression_due(), self.moves

    def fork(self, source: int, target: int) -> None:
        """Let `target`, which must be empty, go on from where `source` is: a prefix is computed once. Whole pages are shared, the rest is copied."""
        if self.lengths[target] or source == target:
            raise ValueError(f"target={target} has {self.lengths[target]} tokens; free it first, or name another sequence")
        length = self.lengths[source]
        if not length:
            return
        assert self.device_lengths is not None and self.table is not None
        # A page's last compressed keys reach past its tokens.
        whole = max(0, length - (self.config.nsa.compress_block - self.config.nsa.compress_stride)) // self.span
        for page in self._pages[source][:whole]:
            self._users[page] += 1
        self._pages[target] = self._pages[source][:whole]
        self.table[target, :whole] = self.table[source, :whole]
        self._grow(target, length)
        for layer in self.layers:
            layer.copy(source, target, [(self._pages[source][p], self._pages[target][p]) for p in range(whole, len(self._pages[source]))])

    def free(self, sequence: int) -> None:
        """Forget a sequence; its pages serve others."""
        for page in self._pages[sequence]:
            self._users[page] -= 1
            if not self._users[page]:
                self._unused.append(page)
        self._pages[sequence] = []
        self.lengths[sequence] = 0
        if self.device_lengths is not None:
            self.device_lengths[sequence] = 0

    def compression_due(self) -> bool:
        """Whether the newest token of some sequence completed a block that is to be compressed."""
        block, stride = self.config.nsa.compress_block, self.config.nsa.compress_stride
        return any(length >= block and (length - block) % stride == 0 for length in self.lengths)

    def _check_room(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"the sequence would grow to {length} tokens, past max_position_embeddings={limit}; shorten the prompt or generate fewer tokens")

    def _place(self, device: torch.device) -> None:
        if self.device_lengths is None:
            self.device_lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
            self.table = torch.zeros(len(self.lengths), 1, dtype=torch.int32, device=device)
            self.moves += 1

    def _grow(self, sequence: int, length: int, on_device: bool = True) -> None:
        assert self.device_lengths is not None and self.table is not None
        pages, first = self._pages[sequence], len(self._pages[sequence])
        while len(pages) * self.span < length:
            if not self._unused:
                self._unused.append(len(self._users))
                self._users.append(0)
            page = self._unused.pop()
            self._users[page] = 1
            pages.append(page)
        if len(pages) > first:
            if len(pages) > self.table.shape[1]:  # in powers of two, so that shapes seldom change
                wider = torch.zeros(len(self.lengths), 1 << (len(pages) - 1).bit_length(), dtype=torch.int32, device=self.table.device)
                wider[:, : self.table.shape[1]] = self.table
                self.table = wider
                self.moves += 1
            self.table[sequence, first : len(pages)] = torch.tensor(pages[first:], dtype=torch.int32).to(self.table.device)
        self.lengths[sequence] = length
        if on_device:
            self.device_lengths[sequence] = length


class SparseLayerCache:
    """One layer of sparse attention: pages of selected and compressed keys and values, rings for the window and for tokens not yet compressed."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self._stores: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.stores)

    @property
    def stores(self) -> list[Tensor]:
        return list(self._stores.values())

    def make_room(self) -> None:
        """As many pages as the cache has, once there is any row."""
        if self._stores:
            self._make({name: self._stores[f"{name}_win"][:0, :, 0] for name in ("k", "v")})

    def _make(self, rows: dict[str, Tensor]) -> None:
        """Stores as wide as rows [T, Hkv, …] by name, with all the pages that there are."""
        owner, config, quantized = self.owner, self.owner.config.nsa, self.owner.quantized
        count, held = owner.num_pages, len(owner.lengths)
        rings = {"win": ring_tokens(config), "raw": config.compress_block}
        if quantized:
            rings["recent"] = recent_tokens(config, owner.settings.threshold)
        for name, x in rows.items():
            heads, width = x.shape[1:]
            in_pages = {"cmp": page_rows(config), "slc": owner.span}
            for kind, size in in_pages.items():
                dtype = torch.float8_e4m3fn if quantized and kind == "slc" else x.dtype
                self._pool(f"{name}_{kind}", (heads, size, width), dtype, x.device, count)
            if quantized:
                self._pool(f"{name}_scale", (heads, owner.span), SCALE, x.device, count)
            for kind, size in rings.items():
                if f"{name}_{kind}" not in self._stores:
                    self._stores[f"{name}_{kind}"] = x.new_zeros(held, heads, size, width)
                    owner.moves += 1

    def _pool(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int) -> None:
        """At least `count` pages, doubling, so that n tokens copy O(n) of them."""
        before = self._stores.get(name)
        if before is None or len(before) < count:
            size = count if before is None else max(count, 2 * len(before))
            # Zeros: a masked product may touch what nobody has written yet, and 0 times NaN is NaN.
            grown = torch.zeros(size, *shape, dtype=dtype, device=device)
            if before is not None:
                grown[: len(before)] = before
            self._stores[name] = grown
            self.owner.moves += 1

    def extend(self, sequence: int, start: int, new: NewRows, compress: Compress) -> dict[str, Tensor]:
        """Append rows [T, Hkv, …] of one sequence, and return all its keys and values as `nsa_attention` takes them; rows of the window that no query of
        these sees are not set."""
        rows = new._asdict()
        owner, config = self.owner, self.owner.config.nsa
        self._make({"k": rows["k_slc"], "v": rows["v_slc"]})
        assert owner.table is not None
        end, pages = start + len(rows["k_slc"]), owner.table[sequence].long()
        found: dict[str, Tensor] = {}
        compressed = self._compress(sequence, start, end, rows, compress)
        for name in ("k", "v"):
            pool, added, held = self._stores[f"{name}_cmp"], compressed[name], num_compressed(start, config)
            _write_pages(pool, pages, held, added)
            found[f"{name}_cmp"] = added if held == 0 else torch.cat([gather_pages(pool, pages, held), added])
            found[f"{name}_slc"] = self._extend_selected(name, sequence, pages, start, rows[f"{name}_slc"])
            found[f"{name}_win"] = self._extend_window(name, sequence, start, rows[f"{name}_win"])
            _write_ring(self._stores[f"{name}_raw"], sequence, start, rows[f"{name}_raw"])
        assert len(found["k_slc"]) == end
        return found

    def _compress(self, sequence: int, start: int, end: int, rows: dict[str, Tensor], compress: Compress) -> dict[str, Tensor]:
        """Rows of the blocks that became whole."""
        config = self.owner.config.nsa
        first, count = num_compressed(start, config), num_compressed(end, config)
        if first == count:
            return {"k": rows["k_raw"][:0], "v": rows["v_raw"][:0]}
        begin = first * config.compress_stride
        index = torch.arange(first, count, device=rows["k_raw"].device)
        token = (index * config.compress_stride - begin)[:, None] + torch.arange(config.compress_block, device=index.device)
        raw = {name: torch.cat([_read_ring(self._stores[f"{name}_raw"], sequence, begin, start), rows[f"{name}_raw"]]) for name in ("k", "v")}
        k, v = compress(raw["k"][token], raw["v"][token], index)
        return {"k": k, "v": v}

    def _extend_selected(self, name: str, sequence: int, pages: Tensor, start: int, new: Tensor) -> Tensor:
        owner, pool = self.owner, self._stores[f"{name}_slc"]
        if not owner.quantized:
            _write_pages(pool, pages, start, new)
            return new if start == 0 else gather_pages(pool, pages, start + len(new))
        ring, scale, size = self._stores[f"{name}_recent"], self._stores[f"{name}_scale"], owner.config.nsa.select_block
        before, after = (max(0, length - owner.settings.threshold) // size * size for length in (start, start + len(new)))
        recent = torch.cat([_read_ring(ring, sequence, before, start), new])  # from token `before` on
        old = gather_pages(pool, pages, before).to(new.dtype) * gather_pages(scale, pages, before).to(new.dtype)[..., None]
        stored, factor = quantize_rows(recent[: after - before])
        _write_pages(pool, pages, before, stored)
        _write_pages(scale, pages, before, factor)
        _write_ring(ring, sequence, start, new)
        return torch.cat([old, recent])

    def _extend_window(self, name: str, sequence: int, start: int, new: Tensor) -> Tensor:
        ring = self._stores[f"{name}_win"]
        if start == 0:
            rows = new
        else:
            kept = min(start, ring.shape[2])
            rows = new.new_zeros(start + len(new), *new.shape[1:])  # a masked product may touch what no query sees
            rows[start - kept : start] = _read_ring(ring, sequence, start - kept, start)
            rows[start:] = new
        _write_ring(ring, sequence, start, new)
        return rows

    def step(self, rows: NewRows, compress: Compress, backend: str = "auto") -> PagedKeysValues:
        """Append a row of each sequence and return what `nsa_decode` reads."""
        owner, config, stores = self.owner, self.owner.config.nsa, self._stores
        if not stores:
            self._make({"k": rows.k_slc, "v": rows.v_slc})
        assert owner.device_lengths is not None and owner.table is not None
        cache = PagedKeysValues(owner.table, owner.device_lengths, threshold=owner.settings.threshold if owner.quantized else 0, **stores)
        append_rows(rows, cache, config, backend=backend)
        if owner.compression_due():
            lengths = owner.device_lengths.long()
            each = torch.arange(len(lengths), device=lengths.device)
            index = (lengths - config.compress_block).div(config.compress_stride, rounding_mode="floor")
            ready = (index >= 0) & ((lengths - config.compress_block) % config.compress_stride == 0)
            index = index.clamp(min=0)
            token = index[:, None] * config.compress_stride + torch.arange(config.compress_block, device=lengths.device)
            k, v = (stores[f"{name}_raw"][each[:, None], :, token % config.compress_block] for name in ("k", "v"))
            rows_per_page = page_rows(config)
            to = torch.where(ready, owner.table.long()[each, index // rows_per_page], 0)
            for name, new in zip(("k", "v"), compress(k, v, index), strict=True):
                stores[f"{name}_cmp"][to, :, index % rows_per_page] = new
        return cache

    def copy(self, source: int, target: int, pages: list[tuple[int, int]]) -> None:
        """What `target` does not share with `source`: rings, and pages by (from, to)."""
        self.make_room()
        for name, store in self._stores.items():
            if name.endswith(("_cmp", "_slc", "_scale")):
                for old, new in pages:
                    store[new] = store[old]
            else:
                store[target] = store[source]


class DenseLayerCache:
    """One layer of dense or windowed attention: keys and values [B, Hkv, capacity, …] one after the other."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.stores)

    @property
    def stores(self) -> list[Tensor]:
        return [x for x in (self.k, self.v) if x is not None]

    def make_room(self) -> None:
        """As long as the longest sequence, once there is any row."""
        if self.k is not None and self.v is not None:
            self._make(self.k[:0, :, 0], self.v[:0, :, 0])

    def _make(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the longest sequence."""
        capacity = dense_capacity(max(self.owner.lengths))
        if self.k is None or self.v is None or self.k.shape[2] < capacity:
            before = (self.k, self.v)
            grown = [x.new_zeros(len(self.owner.lengths), x.shape[1], capacity, x.shape[2]) for x in (k, v)]
            for old, new in zip(before, grown, strict=True):
                if old is not None:
                    new[:, :, : old.shape[2]] = old
            self.k, self.v = grown
            self.owner.moves += 1
        return self.k, self.v

    def extend(self, sequence: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [T, Hkv, …]; all of the sequence [S, Hkv, …]."""
        keys, values = self._make(k, v)
        end = start + len(k)
        keys[sequence, :, start:end], values[sequence, :, start:end] = k.transpose(0, 1), v.transpose(0, 1)
        return keys[sequence, :, :end].transpose(0, 1), values[sequence, :, :end].transpose(0, 1)

    def step(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k, v [B, Hkv, …]; all [B, Hkv, capacity, …], and the newest position of each sequence, int64 [B]."""
        keys, values = self._make(k, v)
        assert self.owner.device_lengths is not None
        t = (self.owner.device_lengths.long() - 1).clamp(min=0)
        each = torch.arange(len(t), device=t.device)
        keys[each, :, t], values[each, :, t] = k, v
        return keys, values, t

    def copy(self, source: int, target: int, _pages: list[tuple[int, int]]) -> None:
        assert self.k is not None and self.v is not None
        self.k[target], self.v[target] = self.k[source], self.v[source]


@dataclass(frozen=True)
class LayerView:
    """What one layer is told of a pass: extend `sequence` from token `start` on, or, with None, every sequence by one."""

    layer: SparseLayerCache | DenseLayerCache
    sequence: int | None
    start: int = 0


def _write_pages(pool: Tensor, pages: Tensor, first: int, rows: Tensor) -> None:
    """rows [T, Hkv, …] into positions `first` … of a pool [pages, Hkv, size, …]."""
    position = torch.arange(first, first + len(rows), device=pages.device)
    to = (pages[position // pool.shape[2]], slice(None), position % pool.shape[2])
    if pool.dtype == torch.float8_e4m3fn:  # which has no indexed writes
        pool, rows = pool.view(torch.uint8), rows.view(torch.uint8)
    pool[to] = rows


def _write_ring(ring: Tensor, sequence: int, first: int, rows: Tensor) -> None:
    """The newest of rows [T, Hkv, …] that begin at position `first` into a ring [B, Hkv, size, …]."""
    size = ring.shape[2]
    position = torch.arange(first, first + len(rows), device=ring.device)[-size:]
    ring[sequence][:, position % size] = rows[-size:].transpose(0, 1)


def _read_ring(ring: Tensor, sequence: int, first: int, last: int) -> Tensor:
    """Positions first … last - 1, [last - first, Hkv, …]."""
    return ring[sequence][:, torch.arange(first, last, device=ring.device) % ring.shape[2]].transpose(0, 1)

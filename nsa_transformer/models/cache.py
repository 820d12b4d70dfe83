"""Keys and values of many sequences, kept while they are generated.

`KVCache` knows lengths and pages, the same for all layers; each layer has its own store for them. A sequence is extended by a chunk of tokens
(`extend`, `model(tokens, cache=…)`), or all sequences by one token each (`step`, `model.decode(tokens, cache)`), which has fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.config import KVCacheConfig, ModelConfig
from nsa_transformer.kernels.decode import append_rows
from nsa_transformer.kernels.paged import SCALE, NewRows, PagedKeysValues, page_rows, page_tokens, quantize_rows, recent_tokens, ring_tokens
from nsa_transformer.models.cache_size import dense_capacity, newest_tokens
from nsa_transformer.models.chunk import ChunkPlan, SparseChunkPlan, ring_pieces, write_ring
from nsa_transformer.models.dense_cache import DenseLayerCache

# φ of whole blocks: keys and values [N, l, Hkv, …], index of each block [N], to compressed and rotated [N, Hkv, …]
Compress = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# φ of a chunk's new blocks: keys and values [T, Hkv, …] of its run of tokens, to compressed and rotated [new blocks, Hkv, …]
CompressRun = Callable[[Tensor, Tensor, SparseChunkPlan], tuple[Tensor, Tensor]]


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
        self.threshold = newest_tokens(config, self.settings) if self.quantized else 0
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

    def extend(self, sequence: int, num_tokens: int, device: torch.device) -> ChunkPlan:
        """Make room for `num_tokens` more; what the layers are to do with them. Raises `ValueError` where the sequence would outgrow the model's positions."""
        self._check_number(sequence=sequence)
        start = self.lengths[sequence]
        end = start + num_tokens
        self._check_room(end)
        self._place(device)
        self._grow(sequence, end)
        if self.config.attention != "nsa":
            return ChunkPlan(sequence, start, end)
        assert self.table is not None
        threshold = self.threshold if self.quantized else None
        return SparseChunkPlan.build(sequence, start, end, self.table[sequence], self.config.nsa, threshold)

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
        self._check_number(source=source, target=target)
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
        self._check_number(sequence=sequence)
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

    def _check_number(self, **numbers: int) -> None:
        for name, number in numbers.items():
            if not 0 <= number < len(self.lengths):
                raise ValueError(f"{name}={number} is not in the cache; write 0 … {len(self.lengths) - 1}")

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
            rings["recent"] = recent_tokens(config, owner.threshold)
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

    def extend(self, plan: SparseChunkPlan, new: NewRows, compress: CompressRun) -> dict[str, Tensor]:
        """Append rows [T, Hkv, …] of one sequence, and return all its keys and values as `nsa_attention` takes them; rows of the window that no query of
        these sees are zeros."""
        rows = new._asdict()
        self._make({"k": rows["k_slc"], "v": rows["v_slc"]})
        found = self._extend_compressed(plan, rows, compress)
        found |= self._extend_selected(plan, rows)
        found |= self._extend_window(plan, rows)
        assert len(found["k_slc"]) == plan.end
        return found

    def _extend_compressed(self, plan: SparseChunkPlan, rows: dict[str, Tensor], compress: CompressRun) -> dict[str, Tensor]:
        found = self._compress(plan, rows, compress)
        for name in ("k", "v"):
            write_ring(self._ring(f"{name}_raw", plan), plan.end, rows[f"{name}_raw"])
            pool, added = self._stores[f"{name}_cmp"], found[f"{name}_cmp"]
            if len(added):
                plan.new_blocks.write(pool, added)
            if plan.blocks_before:
                found[f"{name}_cmp"] = plan.all_blocks.read(pool)
        return found

    def _compress(self, plan: SparseChunkPlan, rows: dict[str, Tensor], compress: CompressRun) -> dict[str, Tensor]:
        """Rows of the blocks that became whole."""
        k, v = rows["k_raw"], rows["v_raw"]
        if plan.blocks == plan.blocks_before:
            return {"k_cmp": k[:0], "v_cmp": v[:0]}
        if plan.run_start < plan.start:
            held = (ring_pieces(self._ring(name, plan), plan.run_start, plan.start) for name in ("k_raw", "v_raw"))
            k, v = (torch.cat([*pieces, x]) for pieces, x in zip(held, (k, v), strict=True))
        k, v = compress(k, v, plan)
        return {"k_cmp": k, "v_cmp": v}

    def _extend_selected(self, plan: SparseChunkPlan, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.owner.quantized:
            found = {f"{name}_slc": self._extend_recent(name, plan, rows[f"{name}_slc"]) for name in ("k", "v")}
            if plan.stored > plan.stored_before:
                self._quantize(plan, found)
            return found
        found = {name: rows[name] for name in ("k_slc", "v_slc")}
        for name, new in found.items():
            plan.new_tokens.write(self._stores[name], new)
        return {name: plan.tokens.read(self._stores[name]) for name in found} if plan.start else found

    def _extend_recent(self, name: str, plan: SparseChunkPlan, new: Tensor) -> Tensor:
        """All rows of a cache in FP8, as they are read before any of them is rounded that becomes old now."""
        ring, rows = self._ring(f"{name}_recent", plan), new
        if plan.start:
            parts = [*ring_pieces(ring, plan.stored_before, plan.start), new]
            if plan.stored_before:
                old, scale = (plan.tokens.read(self._stores[f"{name}_{kind}"]).to(new.dtype) for kind in ("slc", "scale"))
                parts.insert(0, old * scale[..., None])
            rows = torch.cat(parts)
        write_ring(ring, plan.end, new)
        return rows

    def _quantize(self, plan: SparseChunkPlan, rows: dict[str, Tensor]) -> None:
        """Those of all rows that become old now, into pages."""
        aged = [rows[name][plan.stored_before : plan.stored] for name in ("k_slc", "v_slc")]
        alike = aged[0].shape == aged[1].shape  # then both at once: half the launches
        each = zip(*quantize_rows(torch.stack(aged)), strict=True) if alike else map(quantize_rows, aged)
        for name, (x, scale) in zip(("k", "v"), each, strict=True):
            plan.new_tokens.write(self._stores[f"{name}_slc"], x)
            plan.new_tokens.write(self._stores[f"{name}_scale"], scale)

    def _extend_window(self, plan: SparseChunkPlan, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: rows[name] for name in ("k_win", "v_win")}
        zero = rows["k_win"].new_zeros(1, 1, 1) if plan.start else None
        for name, new in found.items():
            ring = self._ring(name, plan)
            if zero is not None:
                first = max(0, plan.start - len(ring))
                left = zero.expand(first, *new.shape[1:])  # the ring: a masked product may touch what no query sees
                found[name] = torch.cat([left, *ring_pieces(ring, first, plan.start), new])
            write_ring(ring, plan.end, new)
        return found

    def _ring(self, name: str, plan: SparseChunkPlan) -> Tensor:
        """A sequence's own, [size, Hkv, …]."""
        return self._stores[name][plan.sequence].transpose(0, 1)

    def step(self, rows: NewRows, compress: Compress, backend: str = "auto") -> PagedKeysValues:
        """Append a row of each sequence and return what `nsa_decode` reads."""
        owner, config, stores = self.owner, self.owner.config.nsa, self._stores
        if not stores:
            self._make({"k": rows.k_slc, "v": rows.v_slc})
        assert owner.device_lengths is not None and owner.table is not None
        cache = PagedKeysValues(owner.table, owner.device_lengths, threshold=owner.threshold, **stores)
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


@dataclass(frozen=True)
class LayerView:
    """What one layer is told of a pass: extend a sequence by a chunk, or, with None, every sequence by one token."""

    layer: SparseLayerCache | DenseLayerCache
    plan: ChunkPlan | None

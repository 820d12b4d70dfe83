"""The Triton pipeline: plan, compressed branch, scores and selection, window, selected branch with the gates; and its backward.

Memory is linear in the tokens, nothing waits for the device, and every sum has one order, so the same inputs give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.triton import (
    hopper,
    hopper_banded,
    hopper_banded_kv,
    hopper_banded_q,
    hopper_grad_kv,
    hopper_selected,
    hopper_selected_kv,
    hopper_selected_q,
    lists,
)
from nsa_transformer.kernels.triton.banded import banded_forward, banded_grad_kv, banded_grad_q, clean_copy, sum_parts
from nsa_transformer.kernels.triton.common import LOG2E, aligned, by_rows, descriptors, packed, precision, split_width, token_descriptors
from nsa_transformer.kernels.triton.gates import gate_gradients
from nsa_transformer.kernels.triton.plan import Plan, make_plan
from nsa_transformer.kernels.triton.select import score, select_blocks
from nsa_transformer.kernels.triton.selected import selected_forward, selected_grad_kv, selected_grad_q, sum_segments
from nsa_transformer.kernels.triton.selected_q import selected_grad_q_stored
from nsa_transformer.kernels.triton.tiles import Tile, Tiles, choose_tiles

SCORE_TABLE = 1 << 26  # float32 entries of the table of importances, 256 MiB
ROWS_IN_CACHE = 1 << 24  # bytes
STORED_SCORES = 1 << 30  # bytes, of as many heads as fit; one head alone may take four times as much
SELECT_CHUNK = 1024  # blocks that selection looks at together


@dataclass(frozen=True)
class _Pack:
    """One call's inputs, in the layout that the kernels read, and its sizes."""

    q: Tensor
    compressed: tuple[Tensor, Tensor]
    selected: tuple[Tensor, Tensor]
    window: tuple[Tensor, Tensor]
    gates: Tensor
    cu_q: Tensor
    cu_k: Tensor
    q_start: Tensor
    config: NSAConfig
    scale: float
    plan: Plan
    tiles: Tiles

    @staticmethod
    def make(q: Tensor, keys_values: tuple[Tensor, ...], gates: Tensor, cu_q: Tensor, cu_k: Tensor, q_start: Tensor, config: NSAConfig, scale: float) -> _Pack:
        k_cmp, v_cmp, *others = keys_values
        group = q.shape[1] // v_cmp.shape[1]
        tiles = choose_tiles(q.shape[2], v_cmp.shape[2], q.element_size(), group, config.select_block, _capability(q.device))
        plan = make_plan(
            cu_q, cu_k, group, config.compress_block, config.compress_stride, config.select_block,
            tiles.band.rows, tiles.band_q.rows, tiles.selected.rows, tiles.selected_q.rows, tiles.stored_q.rows, tiles.score.rows,
            tiles.compressed_kv.keys, tiles.window_kv.keys,
        )  # fmt: skip
        compressed = (_clean(k_cmp, plan), _clean(v_cmp, plan))
        k_slc, v_slc, k_win, v_win = (by_rows(x) for x in others)
        q = q if q.stride(2) == 1 else q.contiguous()
        gates = gates.to(torch.float32).contiguous()  # 4 bytes a row can be copied ahead, 2 cannot: 25.6 instead of 19 ms in one kernel at 64k
        return _Pack(q, compressed, (k_slc, v_slc), (k_win, v_win), gates, cu_q, cu_k, q_start, config, scale, plan, tiles)

    @property
    def num_docs(self) -> int:
        return self.cu_q.shape[0] - 1

    @property
    def hkv(self) -> int:
        return self.selected[0].shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.hkv

    @property
    def log_scale(self) -> float:
        return self.scale * LOG2E

    def row_tiles(self, rows: int) -> int:
        """At most so many tiles of query rows: each document may leave one unfilled."""
        return self.q.shape[0] * self.group // rows + min(self.num_docs, self.q.shape[0])

    def key_tiles(self, keys: int, size: int) -> int:
        return keys // size + min(self.num_docs, max(keys, 1))

    def query(self) -> tuple[Tensor, int, int]:
        return self.q, self.q.stride(0), self.q.stride(1)

    def widths(self) -> dict[str, int | str]:
        (d0, d1), (e0, e1) = split_width(self.q.shape[2]), split_width(self.selected[1].shape[2])
        return {"D0": d0, "D1": d1, "E0": e0, "E1": e1, "PRECISION": precision(self.q.dtype)}

    def heads(self) -> dict[str, int]:
        return {"HQ": self.q.shape[1], "G": self.group}

    def band(self, name: str) -> dict[str, int]:
        if name == "window":
            return {"BLOCK": 1, "STRIDE": 1, "WINDOW": self.config.window}
        return {"BLOCK": self.config.compress_block, "STRIDE": self.config.compress_stride, "WINDOW": 0}


def _clean(x: Tensor, plan: Plan) -> Tensor:
    """k_cmp or v_cmp with zeros in the rows past the documents' own: tiles reach over the end, and 0 times what lies there must be 0."""
    rows, hkv, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(max(rows, 1), hkv, width, dtype=x.dtype, device=x.device)
    chunk = 64
    clean_copy[(triton.cdiv(out.shape[0] * hkv, chunk),)](
        x, x.stride(0), x.stride(1), out, plan.compressed, plan.blocks.shape[0] - 1, out.shape[0], hkv, width, triton.next_power_of_2(width), chunk
    )
    return out


def _keys_values(pair: tuple[Tensor, Tensor], keys: int) -> tuple[object, ...]:
    return (*descriptors(pair[0], keys), *descriptors(pair[1], keys))


def _launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "STAGES": tile.stages} | ({"maxnreg": tile.registers} if tile.registers else {})


def forward(
    q: Tensor,
    keys_values: tuple[Tensor, ...],
    gates: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_start: Tensor,
    blocks: Tensor | None,
    config: NSAConfig,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, Hq, Dv]; blocks int32 [T, Hkv, n]; and for the backward, with `save`, the branches' outputs [3, T, Hq, Dv] and lse float32 [3, T, Hq]
    (see `common.store_lse`)."""
    queries, heads, _ = q.shape
    hkv, width = keys_values[1].shape[1:]
    out = q.new_empty(queries, heads, width)
    outs = q.new_empty(3, queries, heads, width)
    lse = q.new_empty(lse_shape(q), dtype=torch.float32)
    if queries == 0:
        return out, q.new_empty(0, hkv, config.num_selected if blocks is None else blocks.shape[2], dtype=torch.int32), *_saved(outs, lse, save)
    pack = _Pack.make(q, keys_values, gates, cu_q, cu_k, q_start, config, scale)
    band_forward(pack, "compressed", outs[0], lse[0])
    if blocks is None:
        blocks = choose_blocks(pack, lse[0])
    band_forward(pack, "window", outs[2], lse[2])
    attend_selected(pack, blocks, outs, out, lse[1], save)
    return out, blocks, *_saved(outs, lse, save)


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """See `common.store_lse`."""
    shape = (3, q.shape[0], q.shape[1])
    return (*shape, 2) if q.dtype == torch.float32 else shape


def _saved(outs: Tensor, lse: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    return (outs, lse) if save else (outs.new_empty(0), lse.new_empty(0))


def band_forward(pack: _Pack, name: str, out: Tensor, lse: Tensor) -> None:
    """The compressed or the window branch."""
    tile = pack.tiles.band
    pair, starts = (pack.window, pack.cu_k) if name == "window" else (pack.compressed, pack.plan.compressed)
    documents = (pack.cu_q, starts, pack.q_start, pack.plan.rows_band, pack.num_docs, pack.log_scale)
    tiles = pack.row_tiles(tile.rows)
    if tile.gluon:
        hopper_banded.banded_forward[(min(tiles * pack.hkv, _programs(pack.q.device)),)](
            *pack.query(), *(hopper.descriptor(x, tile.keys) for x in pair), out, lse, *documents,
            **pack.heads(), HKV=pack.hkv, **pack.band(name), N=tile.keys, D=out.shape[2], **_launch(tile),
        )  # fmt: skip
        return
    banded_forward[(tiles, pack.hkv)](
        *pack.query(), *_keys_values(pair, tile.keys), out, lse, *documents,
        **pack.heads(), **pack.band(name), M=tile.rows, N=tile.keys, **pack.widths(), **_launch(tile),
    )  # fmt: skip


def choose_blocks(pack: _Pack, lse: Tensor) -> Tensor:
    """The blocks of every query, int32 [T, Hkv, n], from the compressed branch's lse; a strip of tokens at a time, so that the table is bounded."""
    config, tile, device = pack.config, pack.tiles.score, pack.q.device
    queries, keys, hkv = pack.q.shape[0], pack.selected[0].shape[0], pack.hkv
    blocks = torch.empty(queries, hkv, config.num_selected, dtype=torch.int32, device=device)
    width = triton.cdiv(triton.cdiv(keys, config.select_block) + tile.keys + 1, 4) * 4
    tiles = pack.key_tiles(queries, tile.rows)
    strip = max(1, min(tiles, SCORE_TABLE // (2 * width * hkv * tile.rows)))
    own, carried = torch.empty(2, strip * tile.rows, hkv, width, dtype=torch.float32, device=device).unbind(0)
    geometry = {"BLOCK": config.compress_block, "STRIDE": config.compress_stride, "SELECT": config.select_block, "NUM": config.num_selected}
    shared = {"HKV": hkv, "P": tile.rows, "N": tile.keys, **geometry}
    for first in range(0, tiles, strip):
        count = min(strip, tiles - first)
        score[(count, hkv)](
            *pack.query(), *descriptors(pack.compressed[0], tile.keys), lse, own, carried,
            pack.cu_q, pack.plan.compressed, pack.q_start, pack.plan.score, pack.num_docs, first, width, pack.log_scale,
            **pack.heads(), HEADS=tile.heads, **shared, **{k: v for k, v in pack.widths().items() if k[0] in "DP"}, **_launch(tile),
        )  # fmt: skip
        # No query of the strip stands later than its index in the pack, or than that many keys before the end.
        reach = min(keys, (first + count) * tile.rows + keys - queries)
        reach = triton.cdiv(reach, config.select_block)
        chunk = max(16, min(SELECT_CHUNK, triton.next_power_of_2(reach)))
        slots = max(2, triton.next_power_of_2(config.num_selected))
        select_blocks[(count * tile.rows, hkv)](
            own, carried, blocks, pack.cu_q, pack.q_start, pack.plan.score, pack.num_docs, first, width, **shared,
            INITIAL=config.num_initial, LOCAL=config.num_local, SLOTS=slots, CHUNK=chunk, GROUPS=max(32, 2 * slots), MERGE=reach > chunk, num_warps=1,
        )  # fmt: skip
    return blocks


def attend_selected(pack: _Pack, blocks: Tensor, outs: Tensor, out: Tensor, lse: Tensor, save: bool) -> None:
    """The selected branch, and out: the three branches weighed by their gates."""
    config, tile = pack.config, pack.tiles.selected
    max_tiles = pack.row_tiles(tile.rows)
    union = _union(pack, blocks, pack.plan.rows_selected, tile)
    chosen = (union.blocks, union.members, union.counts, pack.gates, outs[0], outs[2], outs[1], out, lse)
    documents = (pack.cu_q, pack.cu_k, pack.q_start, pack.plan.rows_selected, pack.num_docs, pack.log_scale)
    shared = {**pack.heads(), "HKV": pack.hkv, "L": union.length, "SELECT": config.select_block, "N": tile.keys, "SAVE": save, **_launch(tile)}
    if tile.gluon:
        hopper_selected.selected_forward[(min(max_tiles * pack.hkv, _programs(pack.q.device)),)](
            *pack.query(), *(hopper.descriptor(x, tile.keys) for x in pack.selected), *chosen, *documents, **shared, D=out.shape[2]
        )
        return
    selected_forward[(max_tiles, pack.hkv)](*pack.query(), *_keys_values(pack.selected, tile.keys), *chosen, *documents, **shared, M=tile.rows, **pack.widths())


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter passes for a chip newer than those with kernels of their own."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (10, 0)


def _programs(device: torch.device) -> int:
    """Multiprocessors; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def backward(
    grad_out: Tensor,
    q: Tensor,
    keys_values: tuple[Tensor, ...],
    gates: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    q_start: Tensor,
    blocks: Tensor,
    outs: Tensor,
    lse: Tensor,
    config: NSAConfig,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, the six keys and values, and the gates."""
    inputs = (q, *keys_values, gates)
    if q.shape[0] == 0:
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs)
    pack = _Pack.make(q, keys_values, gates, cu_q, cu_k, q_start, config, scale)
    grad_out = packed(grad_out)
    delta, grad_gates = gate_gradients(grad_out, outs, gates.dtype)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    band_grad_q(pack, "compressed", grad_out, lse[0], delta[0], grad_q)
    band_grad_q(pack, "window", grad_out, lse[2], delta[2], grad_q)
    selected = selected_gradients(pack, blocks, grad_out, lse[1], delta[1], grad_q)
    compressed = band_grad_kv(pack, "compressed", grad_out, lse[0], delta[0], keys_values[0].shape[0])
    window = band_grad_kv(pack, "window", grad_out, lse[2], delta[2], keys_values[4].shape[0])
    return grad_q, *compressed, *selected, *window, grad_gates


def band_grad_q(pack: _Pack, name: str, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor) -> None:
    tile = pack.tiles.band_q
    pair, starts = (pack.window, pack.cu_k) if name == "window" else (pack.compressed, pack.plan.compressed)
    tiles = pack.row_tiles(tile.rows)
    documents = (pack.cu_q, starts, pack.q_start, pack.plan.rows_band_q, pack.num_docs, pack.log_scale, pack.scale)
    if tile.gluon:
        hopper_banded_q.banded_grad_q[(min(tiles * pack.hkv, _programs(pack.q.device)),)](
            *pack.query(), *(hopper.descriptor(x, tile.keys) for x in pair), grad_out, lse, delta, pack.gates, grad_q, *documents,
            **pack.heads(), HKV=pack.hkv, **pack.band(name), N=tile.keys, D=pack.q.shape[2], **_launch(tile),
        )  # fmt: skip
        return
    banded_grad_q[(tiles, pack.hkv)](
        *pack.query(), *_keys_values(pair, tile.keys), grad_out, lse, delta, pack.gates, grad_q, *documents,
        **pack.heads(), **pack.band(name), M=tile.rows, N=tile.keys, **pack.widths(), **_launch(tile),
    )  # fmt: skip


def _parts(pack: _Pack, tiles: int, size: int) -> int:
    """Runs of queries that the compressed keys' gradients are summed over apart: so short that their rows stay in the cache while all
    keys pass over them, so few that the parts, of `size` bytes each, fit in a gigabyte."""
    rows = pack.q.shape[0] * pack.group * (pack.q.shape[2] + pack.selected[1].shape[2]) * pack.q.element_size()
    wanted = max(rows // ROWS_IN_CACHE, 4 * _programs(pack.q.device) // (tiles * pack.hkv))
    return max(1, min(64, (1 << 30) // max(size, 1), triton.next_power_of_2(max(wanted, 1))))


def band_grad_kv(pack: _Pack, name: str, grad_out: Tensor, lse: Tensor, delta: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    windowed = name == "window"
    tile = pack.tiles.window_kv if windowed else pack.tiles.compressed_kv
    pair, starts = (pack.window, pack.cu_k) if windowed else (pack.compressed, pack.plan.compressed)
    tile_starts = pack.plan.keys_window if windowed else pack.plan.keys_compressed
    hkv, device, dtype = pack.hkv, pack.q.device, pack.q.dtype
    shapes = [(num_rows, hkv, x.shape[2]) for x in pair]
    grads = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
    if num_rows == 0:
        return grads  # type: ignore[return-value]
    tiles = pack.key_tiles(num_rows, tile.keys)
    parts = 1 if windowed else _parts(pack, tiles, sum(8 * grad.numel() // 2 for grad in grads))
    into = grads if windowed else tuple(torch.empty(parts, *shape, dtype=torch.float32, device=device) for shape in shapes)
    documents = (pack.cu_q, starts, pack.q_start, tile_starts, pack.num_docs, pack.log_scale, pack.scale, parts)
    if tile.gluon:
        hopper_banded_kv.banded_grad_kv[(tiles * parts, hkv)](
            *(hopper_grad_kv.neighbours_descriptor(x, pack.group, tile.rows) for x in (pack.q if aligned(pack.q) else packed(pack.q), grad_out)),
            *(hopper.descriptor(x, 64) for x in pair), lse, delta, pack.gates, *into, num_rows, *documents,
            **pack.heads(), HKV=hkv, **pack.band(name), D=pack.q.shape[2], **_launch(tile),
        )  # fmt: skip
    else:
        q, group = pack.q, pack.group
        boxes = group & (group - 1) == 0 and group <= tile.rows and aligned(q)
        rows = (*token_descriptors(q, tile.rows, group), *token_descriptors(grad_out, tile.rows, group)) if boxes else (None,) * 4
        banded_grad_kv[(tiles * parts, hkv)](
            *pack.query(), *_keys_values(pair, tile.keys), grad_out, *rows, lse, delta, pack.gates, *into, num_rows, *documents, BOXES=boxes,
            **pack.heads(), HKV=hkv, **pack.band(name), M=tile.rows, N=tile.keys, **pack.widths(), **_launch(tile),
        )  # fmt: skip
    if not windowed:
        for source, grad in zip(into, grads, strict=True):
            size = grad.numel()
            sum_parts[(triton.cdiv(size, 1024),)](source, grad, pack.plan.compressed, pack.num_docs, size, hkv * grad.shape[2], parts, 1024)
    return grads  # type: ignore[return-value]


def selected_dq(pack: _Pack, blocks: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor) -> None:
    config, tile = pack.config, pack.tiles.selected_q
    max_tiles = pack.row_tiles(tile.rows)
    union = _union(pack, blocks, pack.plan.rows_selected_q, tile)
    chosen = (union.blocks, union.members, union.counts, grad_out, lse, delta, pack.gates, grad_q)
    documents = (pack.cu_q, pack.cu_k, pack.q_start, pack.plan.rows_selected_q, pack.num_docs, pack.log_scale, pack.scale)
    shared = {**pack.heads(), "HKV": pack.hkv, "L": union.length, "SELECT": config.select_block, "N": tile.keys, **_launch(tile)}
    if tile.gluon:
        hopper_selected_q.selected_grad_q[(min(max_tiles * pack.hkv, _programs(pack.q.device)),)](
            *pack.query(), *(hopper.descriptor(x, tile.keys) for x in pack.selected), *chosen, *documents, **shared, D=pack.q.shape[2]
        )
        return
    selected_grad_q[(max_tiles, pack.hkv)](*pack.query(), *_keys_values(pack.selected, tile.keys), *chosen, *documents, **shared, M=tile.rows, **pack.widths())


def _segment(entries: int, device: torch.device) -> int:
    """Tokens of a segment: so few that the segments fill the device several times over, so many that their parts stay small."""
    return max(128, min(2048, triton.next_power_of_2(max(entries, 1)) // (16 * triton.next_power_of_2(_programs(device)))))


def _union(pack: _Pack, blocks: Tensor, tiles: Tensor, tile: Tile, places: Tensor | None = None) -> lists.Union:
    keys = pack.selected[0].shape[0]
    return lists.make_union(blocks, keys, pack.cu_q, pack.q_start, tiles, pack.row_tiles(tile.rows), pack.group, tile.rows, pack.config.select_block, places)


def _stored_dq(pack: _Pack, union: lists.Union, starts: Tensor, scores: Tensor, grad_q: Tensor, head: int, heads: int, first_owner: int) -> None:
    tile, (first, second) = pack.tiles.stored_q, split_width(pack.q.shape[2])
    selected_grad_q_stored[(pack.row_tiles(tile.rows), heads)](
        *descriptors(pack.selected[0], tile.keys), union.blocks, union.members, union.last, union.counts, starts, scores, grad_q,
        pack.cu_q, pack.cu_k, pack.plan.rows_stored_q, pack.num_docs, head, first_owner, pack.scale,
        **pack.heads(), HKV=pack.hkv, L=union.length, SELECT=pack.config.select_block, M=tile.rows, N=tile.keys,
        D0=first, D1=second, PRECISION=precision(pack.q.dtype), SIXTEENS=pack.tiles.selected_kv.gluon, **_launch(tile),
    )  # fmt: skip


def _stored_heads(pack: _Pack, blocks: Tensor) -> int:
    """For how many key/value heads at a time the gradients of the selected scores are stored between dk, dv and dq; 0: one head's are too large."""
    size = blocks.shape[0] * blocks.shape[2] * pack.group * pack.config.select_block * pack.q.element_size()
    return 0 if size > 4 * STORED_SCORES else min(pack.hkv, max(1, STORED_SCORES // max(size, 1)))


def selected_gradients(pack: _Pack, blocks: Tensor, grad_out: Tensor, lse: Tensor, delta: Tensor, grad_q: Tensor) -> tuple[Tensor, Tensor]:
    """dk and dv of the selected branch; its dq is added to grad_q."""
    config, tile, hkv, device = pack.config, pack.tiles.selected_kv, pack.hkv, pack.q.device
    num_keys = pack.selected[0].shape[0]
    num_blocks = pack.key_tiles(num_keys, config.select_block)
    segment = _segment(blocks.numel(), device)
    chosen = lists.make_choosers(blocks, pack.cu_q, pack.q_start, pack.plan.blocks, num_blocks, config.select_block, segment)
    grads = [torch.empty(num_keys, hkv, x.shape[2], dtype=x.dtype, device=device) for x in pack.selected]
    pieces = triton.cdiv(config.select_block, tile.keys)
    parts = [torch.empty(max(chosen.max_shared, 1), pieces * tile.keys, x.shape[2], dtype=torch.float32, device=device) for x in pack.selected]
    listed = (chosen.tokens, chosen.starts, chosen.segments, chosen.shared)
    documents = (pack.cu_q, pack.cu_k, pack.q_start, pack.plan.blocks, pack.num_docs, num_blocks, segment)
    heads, q = _stored_heads(pack, blocks), packed(pack.q) if tile.gluon else pack.q
    scores = pack.q.new_empty(heads * blocks.shape[0] * blocks.shape[2], config.select_block, pack.group)
    union = _union(pack, blocks, pack.plan.rows_stored_q, pack.tiles.stored_q, chosen.places) if heads else None
    for head in range(0, hkv, heads or hkv):
        count = min(heads or hkv, hkv - head)
        owners = (head * num_blocks, (head + count) * num_blocks)
        grid = (chosen.max_segments // hkv * count if count < hkv else chosen.max_segments, pieces)
        if tile.gluon:
            hopper_selected_kv.selected_grad_kv[grid](
                *(hopper_grad_kv.token_descriptor(x, pack.group) for x in (q, grad_out)),
                *(hopper.descriptor(x, 64) for x in pack.selected), *listed, lse, delta, pack.gates, *grads, *parts, scores,
                *documents, *owners, pack.q.shape[0], pack.log_scale, pack.scale,
                **pack.heads(), HKV=hkv, SELECT=config.select_block, D=pack.q.shape[2], **_launch(tile), STORE=heads > 0,
            )  # fmt: skip
        else:
            selected_grad_kv[grid](
                *pack.query(), *_keys_values(pack.selected, tile.keys), *listed, grad_out, lse, delta, pack.gates, *grads, *parts, scores,
                *documents, *owners, pack.log_scale, pack.scale,
                **pack.heads(), HKV=hkv, SELECT=config.select_block, M=tile.rows, N=tile.keys, **pack.widths(), **_launch(tile), STORE=heads > 0,
            )  # fmt: skip
        if union is not None:
            _stored_dq(pack, union, chosen.starts, scores, grad_q, head, count, owners[0])
    if union is None:
        selected_dq(pack, blocks, grad_out, lse, delta, grad_q)
    padded = pieces * tile.keys
    rows = min(8, padded)  # the sum of the block that all tokens choose is long: many programs share it
    for source, grad in zip(parts, grads, strict=True):
        first, second = split_width(grad.shape[2])
        sum_segments[(hkv * num_blocks, padded // rows)](
            source, grad, chosen.shared, pack.cu_k, pack.plan.blocks, pack.num_docs, num_blocks, hkv, config.select_block, padded, rows, first, second
        )
    return grads[0], grads[1]

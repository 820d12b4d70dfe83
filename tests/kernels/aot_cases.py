"""The launches that `tests/kernels/aot.py` compiles: forward and backward of the attention, of φ, of the experts and of the rotary embedding, and what a few
rows take, per kind of model with its own tiles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from nsa_transformer.config import NSAConfig
from tests.kernels.aot import Case


def attention(width: int, width_v: int, group: int, dtype: torch.dtype, config: NSAConfig | None = None, tokens: int = 4096, programs: int = 132) -> None:
    """Forward with and without given blocks, and backward, of a pack of two documents. Nothing runs, so every result is whatever the memory held."""
    from nsa_transformer.kernels.triton import attention as pipeline

    config, hkv, docs = config or NSAConfig(), 2, 2
    q = torch.empty(tokens, hkv * group, width, dtype=dtype)
    keys = tokens // config.compress_stride
    keys_values = tuple(torch.empty(rows, hkv, size, dtype=dtype) for rows in (keys, tokens, tokens) for size in (width, width_v))
    gates = torch.empty(tokens, hkv * group, 3, dtype=dtype)
    cu = torch.zeros(docs + 1, dtype=torch.int32)
    starts = torch.zeros(docs, dtype=torch.int32)
    # For tensors on the CPU the pipeline takes the interpreter's chip: one multiprocessor, and no kernels for one capability alone.
    chip = mock.patch.multiple(pipeline, _programs=lambda device: programs, _capability=torch.cuda.get_device_capability)
    with chip:
        out, blocks, outs, lse = pipeline.forward(q, keys_values, gates, cu, cu, starts, None, config, width**-0.5, True)
        pipeline.backward(torch.empty_like(out), q, keys_values, gates, cu, cu, starts, blocks, outs, lse, config, width**-0.5)


def compression(width: int, width_v: int, dtype: torch.dtype, config: NSAConfig | None = None, hkv: int = 4, tokens: int = 4096) -> None:
    """φ of both kinds, forward and backward, on keys and values that are a third of a projection's rows."""
    from nsa_transformer.kernels.triton import compress, compress_mlp

    config = config or NSAConfig()
    block, stride = config.compress_block, config.compress_stride
    k, v = (torch.empty(tokens, 3, hkv, size, dtype=dtype)[:, 0] for size in (width, width_v))
    plan = compress.make_plan(torch.zeros(3, dtype=torch.int32), block, stride)
    compress.mean_backward(*compress.mean(k, v, plan, block, stride), plan, tokens, block, stride)
    chunks = compress_mlp.split(k, v, torch.empty(block, width), torch.empty(block, width_v), plan, block, stride)
    parts = block // stride
    shares = (torch.empty(len(x), size * parts, dtype=dtype) for x, size in zip(chunks, (width, width_v), strict=True))
    hidden_k, hidden_v, pre_k, pre_v = compress_mlp.combine(*shares, plan, tokens // stride, hkv, parts)
    compress_mlp.combine_backward(hidden_k, hidden_v, pre_k, pre_v, plan, parts)
    compress_mlp.split_backward(*chunks, plan, tokens, hkv, block, stride, torch.float32, torch.float32)


def experts(hidden_size: int, width: int, num: int, top_k: int, tokens: int, dtype: torch.dtype) -> None:
    """Forward and backward of a mixture of experts."""
    from nsa_transformer.kernels.triton import experts as kernels

    x, indices = torch.empty(tokens, hidden_size, dtype=dtype), torch.zeros(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    w13, w2 = torch.empty(num, 2 * width, hidden_size, dtype=dtype), torch.empty(num, hidden_size, width, dtype=dtype)
    y, hidden, routing = kernels.forward(x, indices, weights, w13, w2, True)
    kernels.backward(y, x, weights, w13, w2, hidden, routing.order, routing.offsets)


def experts_decode(dtype: torch.dtype) -> None:
    """Few rows, of one token and of many, with the experts in slots and without; widths as in Qwen3-30B-A3B."""
    from nsa_transformer.kernels.triton import experts_decode as kernels
    from nsa_transformer.kernels.triton.expert_slots import Slots

    hidden_size, width, num, top_k = 2048, 768, 16, 8
    w13, w2 = torch.empty(num, 2 * width, hidden_size, dtype=dtype), torch.empty(num, hidden_size, width, dtype=dtype)
    for tokens, slots in ((1, Slots.empty(1, num, 16, torch.device("cpu")).layer(0)), (1, None), (24, None), (64, None)):
        x, indices = torch.empty(tokens, hidden_size, dtype=dtype), torch.zeros(tokens, top_k, dtype=torch.int64)
        joins = None if slots is None else (lambda: None, lambda: None)
        kernels.forward(x, indices, torch.empty(tokens, top_k), w13, w2, slots, joins)


def expert_slots(num: int = 128, slots: int = 46, words: int = 3 * 768 * 2048 // 2) -> None:
    """Plan of both policies and of a guess, copies of missing experts, part by part and whole, and of neighbouring ones."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    state = kernels.Slots.empty(1, num, slots, torch.device("cpu")).layer(0)
    host, pool = torch.empty(num, words, dtype=torch.int32), torch.empty(slots, words, dtype=torch.int32)
    for policy, demand in (("lru", True), ("frequency", True), ("lru", False)):
        kernels.plan(torch.zeros(1, 8, dtype=torch.int64), state, policy, demand)
    for start, part in ((0, words // 3 * 2), (words // 3 * 2, words // 3), (0, words)):
        kernels.fetch(host, pool, state, start, part)
    kernels.stream(host, pool, state, 0, torch.empty(7, words // 3 * 2, dtype=torch.int32), torch.empty(7, words // 3, dtype=torch.int32))


def decoding(
    sequences: int, pages: int, dk: int, dv: int, group: int, dtype: torch.dtype, threshold: int | None = None, config: NSAConfig | None = None
) -> None:
    """A step of the attention for a token of each sequence, and what stores it."""
    from nsa_transformer.kernels.paged import SCALE, NewRows, PagedKeysValues, page_rows, page_tokens, recent_tokens, ring_tokens
    from nsa_transformer.kernels.triton import decode, decode_write

    config = config or NSAConfig()

    def pair(*size: int, kind: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(*size, dk, dtype=kind), torch.empty(*size, dv, dtype=kind)

    count, hkv = sequences * pages, 2
    stored = pair(count, hkv, page_tokens(config), kind=dtype if threshold is None else torch.float8_e4m3fn)
    cache = PagedKeysValues(
        torch.zeros(sequences, pages, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32),
        *pair(count, hkv, page_rows(config)), *stored, *pair(sequences, hkv, ring_tokens(config)),
    )  # fmt: skip
    raw = dict(zip(("k_raw", "v_raw"), pair(sequences, hkv, config.compress_block), strict=True))
    if threshold is not None:
        scales = {name: torch.empty(count, hkv, page_tokens(config), dtype=SCALE) for name in ("k_scale", "v_scale")}
        recent = zip(("k_recent", "v_recent"), pair(sequences, hkv, recent_tokens(config, threshold)), strict=True)
        cache = replace(cache, **scales, **dict(recent), threshold=threshold)
    decode_write.write(NewRows(*pair(sequences, hkv), *pair(sequences, hkv), *pair(sequences, hkv)), replace(cache, **raw), config)
    decode.decode(torch.empty(sequences, hkv * group, dk, dtype=dtype), torch.empty(sequences, hkv * group, 3), cache, config, 0.1)


def rotary(width: int, heads: int, dtype: torch.dtype) -> None:
    """Forward of two thirds of a projection's heads, as of the keys, and backward."""
    from nsa_transformer.kernels.triton import rotary as kernels

    tokens = 4096
    x, angle = torch.empty(tokens, 3 * heads, width, dtype=dtype)[:, heads:], torch.empty(tokens, width // 2)
    kernels.rotate(kernels.rotate(x, angle, angle, False), angle, angle, True)


def few_rows(tokens: int, hidden: int, experts: int, top_k: int, groups: int, heads: int, dtype: torch.dtype) -> None:
    """Router and gates of a step of decoding."""
    from nsa_transformer.kernels.triton import few_rows as kernels

    bias = torch.empty(experts)
    kernels.route(torch.empty(tokens, hidden, dtype=dtype), torch.empty(experts, hidden, dtype=dtype), bias, top_k, groups, min(groups, 4), True, 2.5)
    kernels.gates(torch.empty(tokens, hidden // 4, dtype=dtype), torch.empty(3 * heads, hidden // 4, dtype=dtype), torch.empty(3 * heads, dtype=dtype))


def cases() -> list[Case]:
    half, full = torch.bfloat16, torch.float32
    return [
        Case("bf16 128 G16", partial(attention, 128, 128, 16, half)),
        Case("bf16 64 G4", partial(attention, 64, 64, 4, half), slow=True),
        Case("bf16 192/128 G16", partial(attention, 192, 128, 16, half), slow=True),
        Case("bf16 256 G8", partial(attention, 256, 256, 8, half), slow=True),
        Case("bf16 128 G4, blocks of 128", partial(attention, 128, 128, 4, half, NSAConfig(select_block=128)), slow=True),
        Case("f32 128 G16", partial(attention, 128, 128, 16, full), slow=True),
        Case("experts bf16, 1024 rows each", partial(experts, 256, 128, 4, 2, 2048, half)),
        Case("experts bf16, 256 rows each", partial(experts, 256, 128, 8, 2, 1024, half), slow=True),
        Case("experts bf16, 64 rows each", partial(experts, 256, 128, 16, 2, 512, half), slow=True),
        Case("experts bf16, few rows each", partial(experts, 256, 128, 64, 2, 128, half), slow=True),
        Case("experts f32", partial(experts, 256, 128, 8, 2, 256, full), slow=True),
        Case("experts decode bf16", partial(experts_decode, half)),
        Case("experts decode f32", partial(experts_decode, full), slow=True),
        Case("expert slots", expert_slots),
        Case("expert slots, all of 512", partial(expert_slots, 512, 512), slow=True),
        Case("decoding bf16 128 G16, 64k", partial(decoding, 1, 64, 128, 128, 16, half)),
        Case("decoding bf16 128 G16, 128k, e4m3", partial(decoding, 16, 128, 128, 128, 16, half, 512), slow=True, targets=(90, 100)),
        Case("decoding bf16 192/128 G3", partial(decoding, 2, 8, 192, 128, 3, half), slow=True),
        Case("decoding bf16 256 G16, blocks of 128", partial(decoding, 2, 64, 256, 256, 16, half, None, NSAConfig(64, 16, 128)), slow=True),
        Case(
            "decoding bf16 256 G16, e4m3, blocks of 128",
            partial(decoding, 2, 64, 256, 256, 16, half, 512, NSAConfig(64, 16, 128)),
            slow=True,
            targets=(90, 100),
        ),
        Case("decoding f32 64 G4, blocks of 128", partial(decoding, 2, 8, 64, 64, 4, full, None, NSAConfig(64, 4, 128)), slow=True),
        Case("phi bf16 128", partial(compression, 128, 128, half)),
        Case("phi bf16 192/128, blocks of 128", partial(compression, 192, 128, half, NSAConfig(128, 16, 128), 3), slow=True),
        Case("phi f32 256, one head", partial(compression, 256, 256, full, NSAConfig(64, 64, 64), 1), slow=True),
        Case("few rows bf16", partial(few_rows, 32, 1024, 64, 6, 1, 32, half)),
        Case("few rows bf16, 256 experts in groups", partial(few_rows, 2, 7168, 256, 8, 8, 128, half), slow=True),
        Case("few rows f32", partial(few_rows, 2, 1024, 64, 6, 1, 32, full), slow=True),
        Case("rotary bf16 128", partial(rotary, 128, 4, half)),
        Case("rotary bf16 192, odd heads", partial(rotary, 192, 3, half), slow=True),
        Case("rotary f32 64", partial(rotary, 64, 4, full), slow=True),
    ]

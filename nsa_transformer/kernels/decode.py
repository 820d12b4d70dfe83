"""`nsa_decode`: Native Sparse Attention of one new token of each sequence against its cache."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.dispatch import check_backend_name, choose_backend, extension_missing, fp8_refuses
from nsa_transformer.kernels.nsa import nsa_attention
from nsa_transformer.kernels.paged import SCALE, NewRows, PagedKeysValues, gather_pages, page_rows, page_tokens, recent_tokens, ring_tokens, write_rows


def nsa_decode(
    q: Tensor,
    gates: Tensor,
    cache: PagedKeysValues,
    config: NSAConfig,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `nsa_attention` gives the last token of each sequence, from keys and values in pages and rings.

    Args:
        q: `[B, Hq, Dk]`, rotated queries at position `cache.lengths - 1`; their own keys and values are in the cache already.
        gates: `[B, Hq, 3]` in q's dtype or float32, after the sigmoid, in the order compressed, selected, window.
        cache: see `PagedKeysValues`; k_cmp, v_cmp, k_win, v_win in q's dtype.
        config: the geometry.
        scale: of the scores; None: `Dk ** -0.5`.
        backend: `triton`: four launches of fixed shape, none waiting for the host. `reference`: gathers each sequence, reading the lengths on the host, and
            calls `nsa_attention`. `cuda`: one launch, of the CUDA extension. `auto`: `cuda` where it takes the step and there are enough
            sequences for it, else as `decoding_backend` says.
        return_blocks: also return the attended blocks.

    Returns:
        `[B, Hq, Dv]` in q's dtype, 0 for a sequence of length 0; with `return_blocks` also int32 `[B, Hkv, n]`, ascending, -1 padded.

    Raises:
        ValueError: naming the argument, what it was and what would do. What only a GPU knows (values of `lengths`, `pages`) is checked on CPU tensors, and
            everywhere under `NSA_CHECK=1`.
    """
    check_backend_name(backend, step=True)
    _check(q, gates, cache, config, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if _takes_extension(backend, q, cache, config):
        from nsa_transformer.kernels.sparse_attention import decode as extension

        with torch.cuda.device_of(q):
            out, blocks = extension.decode(q, gates, cache, config, scale)
    elif decoding_backend(backend, q, cache.v_cmp[:0, 0], config, cache.k_scale is not None) == "reference":
        out, blocks = _gathered(q, gates, cache, config, scale, backend)
    else:
        from nsa_transformer.kernels.triton import decode as kernels

        with torch.cuda.device_of(q):
            out, blocks = kernels.decode(q, gates, cache, config, scale)
    if not return_blocks:
        return out
    nowhere = torch.iinfo(torch.int32).max
    blocks = blocks.masked_fill(blocks < 0, nowhere).sort(-1).values
    return out, blocks.masked_fill(blocks == nowhere, -1)


def append_rows(rows: NewRows, cache: PagedKeysValues, config: NSAConfig, *, backend: str = "auto") -> None:
    """Store a new token of each sequence, at position `cache.lengths - 1`, before `nsa_decode` reads it; with e4m3, quantize the block that became old.

    Page 0 takes what is written for no sequence, so it must be nobody's. Fixed shapes and no wait for the device; `backend` and errors as for `nsa_decode`, but
    there is no `cuda` here.
    """
    check_backend_name(backend)
    _check_rows(rows, cache, config)
    if decoding_backend(backend, rows.k_slc, rows.v_slc, config, cache.k_scale is not None, "k_slc") == "reference":
        write_rows(rows, cache, config)
        return
    from nsa_transformer.kernels.triton import decode_write as kernels

    with torch.cuda.device_of(rows.k_slc):
        kernels.write(rows, cache, config)


def _takes_extension(backend: str, q: Tensor, cache: PagedKeysValues, config: NSAConfig) -> bool:
    """Whether the CUDA extension computes this step; a `ValueError` saying why not where it was asked for by name."""
    if backend != "cuda" and (backend != "auto" or q.device.type != "cuda" or extension_missing() is not None or torch.compiler.is_compiling()):
        return False  # torch.compile would leave its graph for a call through ctypes
    from nsa_transformer.kernels.sparse_attention import decode as extension

    refusal = extension.refuses(q, cache, config)
    if backend == "auto":
        return refusal is None and extension.worthwhile(q, cache, config)
    if refusal is not None:
        raise ValueError(f"backend='cuda' does not take these inputs: {refusal}; write backend='auto' or 'reference'")
    return True


def decoding_backend(backend: str, q: Tensor, v: Tensor, config: NSAConfig, quantized: bool, name: str = "q") -> str:
    """The backend of a step that the CUDA extension does not compute: `choose_backend`'s, and plain PyTorch for e4m3 where the GPU has none. q `[B, heads, Dk]`
    and v `[B, heads, Dv]` count for their device, dtype and widths."""
    refusal = fp8_refuses(q) if quantized else None
    if refusal is None:
        return choose_backend(backend, q, v, config, name)
    if backend == "triton":
        raise ValueError(f"backend='triton' does not take this cache: {refusal}; write backend='auto' or 'reference'")
    return "reference"


def gather_sequence(cache: PagedKeysValues, sequence: int, config: NSAConfig, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """k_cmp, v_cmp, k_slc, v_slc, k_win, v_win of one sequence as `nsa_attention` takes them. Rows that have left the window's ring are not set."""
    length, pages = int(cache.lengths[sequence]), cache.pages[sequence].long()
    rows = max(0, (length - config.compress_block) // config.compress_stride + 1)
    position = torch.arange(length, device=pages.device)
    quantized = (cache.k_scale, cache.v_scale), (cache.k_recent, cache.v_recent)
    selected, window = [], []
    for pool, scale, recent, ring in zip((cache.k_slc, cache.v_slc), *quantized, (cache.k_win, cache.v_win), strict=True):
        x = gather_pages(pool, pages, length).to(dtype)
        if scale is not None:
            assert recent is not None
            x = x * gather_pages(scale, pages, length)[..., None].to(dtype)
            newer = position[max(0, length - cache.threshold) // config.select_block * config.select_block :]
            x[newer] = recent[sequence][:, newer % recent.shape[2]].transpose(0, 1)
        selected.append(x)
        newest = position[-ring.shape[2] :]
        window.append(torch.zeros_like(x))
        window[-1][newest] = ring[sequence][:, newest % ring.shape[2]].transpose(0, 1)
    return gather_pages(cache.k_cmp, pages, rows), gather_pages(cache.v_cmp, pages, rows), *selected, *window


def _gathered(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:2], cache.v_slc.shape[3])
    blocks = torch.full((q.shape[0], cache.k_slc.shape[1], config.num_selected), -1, dtype=torch.int32, device=q.device)
    for sequence, length in enumerate(cache.lengths.tolist()):
        if length:
            keys_values = gather_sequence(cache, sequence, config, q.dtype)
            last = slice(sequence, sequence + 1)
            k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = keys_values
            out[last], blocks[last] = nsa_attention(
                q[last], k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates[last], config, scale=scale, backend=backend, return_blocks=True
            )
    return out, blocks


def _check(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float | None) -> None:
    for name, x in (("q", q), ("gates", gates)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise ValueError(f"{name} is {_describe(x)}; give a tensor [B, Hq, {'Dk' if name == 'q' else '3'}]")
    kv_heads = _check_cache("q", q, cache, config)
    sequences, heads, _ = q.shape
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which k_slc's {kv_heads} do not divide; give a multiple of {kv_heads}")
    if tuple(gates.shape) != (sequences, heads, 3) or gates.dtype not in (q.dtype, torch.float32) or gates.device != q.device:
        raise ValueError(f"gates is {_describe(gates)}; give {q.dtype} or torch.float32 {[sequences, heads, 3]} on {q.device}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be greater than 0, or None for Dk ** -0.5")


def _check_rows(rows: NewRows, cache: PagedKeysValues, config: NSAConfig) -> None:
    if not isinstance(rows, NewRows):
        raise ValueError(f"rows is {type(rows).__name__}; give a NewRows")
    k = rows.k_slc
    if not isinstance(k, Tensor) or k.dim() != 3:
        raise ValueError(f"rows.k_slc is {_describe(k)}; give a tensor [B, Hkv, Dk]")
    kv_heads = _check_cache("rows.k_slc", k, cache, config, raw=True)
    for name, x in rows._asdict().items():
        shape = (len(k), kv_heads, k.shape[2] if name.startswith("k") else cache.v_slc.shape[3])
        if not isinstance(x, Tensor) or tuple(x.shape) != shape or x.dtype != k.dtype or x.device != k.device:
            raise ValueError(f"rows.{name} is {_describe(x)}; rows.k_slc and the cache ask for {k.dtype} {list(shape)} on {k.device}")


def _check_cache(name: str, x: Tensor, cache: PagedKeysValues, config: NSAConfig, raw: bool = False) -> int:
    """That the cache is one of x `[B, heads, Dk]`, called `name`; its key/value heads. `raw`: with the rings that compressed keys are to be made of."""
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config is {type(config).__name__}; give an NSAConfig")
    if not isinstance(cache, PagedKeysValues):
        raise ValueError(f"cache is {type(cache).__name__}; give a PagedKeysValues")
    if cache.k_slc.dim() != 4 or cache.v_slc.dim() != 4:
        raise ValueError(f"k_slc has shape {list(cache.k_slc.shape)}, v_slc {list(cache.v_slc.shape)}; give [pages, Hkv, tokens, width]")
    sequences, _, dk = x.shape
    count, kv_heads, tokens, _ = cache.k_slc.shape
    dv, ring = cache.v_slc.shape[3], ring_tokens(config)
    quantized = cache.k_slc.dtype == torch.float8_e4m3fn
    stored = torch.float8_e4m3fn if quantized else x.dtype
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "k_slc": ((count, kv_heads, page_tokens(config), dk), stored),
        "v_slc": ((count, kv_heads, page_tokens(config), dv), stored),
        "k_cmp": ((count, kv_heads, page_rows(config), dk), x.dtype),
        "v_cmp": ((count, kv_heads, page_rows(config), dv), x.dtype),
        "k_win": ((sequences, kv_heads, ring, dk), x.dtype),
        "v_win": ((sequences, kv_heads, ring, dv), x.dtype),
        "lengths": ((sequences,), torch.int32),
        "pages": ((sequences, cache.pages.shape[-1]), torch.int32),
    }
    if raw:
        wanted |= {f"{kind}_raw": ((sequences, kv_heads, config.compress_block, width), x.dtype) for kind, width in (("k", dk), ("v", dv))}
    if quantized:
        recent = recent_tokens(config, cache.threshold)
        wanted |= {
            "k_scale": ((count, kv_heads, tokens), SCALE),
            "v_scale": ((count, kv_heads, tokens), SCALE),
            "k_recent": ((sequences, kv_heads, recent, dk), x.dtype),
            "v_recent": ((sequences, kv_heads, recent, dv), x.dtype),
        }
    elif any(part is not None for part in (cache.k_scale, cache.v_scale, cache.k_recent, cache.v_recent)):
        raise ValueError(f"cache has scales or rings of e4m3, and k_slc is {cache.k_slc.dtype}; give k_slc and v_slc in torch.float8_e4m3fn, or leave them out")
    for part, (shape, dtype) in wanted.items():
        held = getattr(cache, part)
        if not isinstance(held, Tensor) or tuple(held.shape) != shape or held.dtype != dtype or held.device != x.device or not held.is_contiguous():
            raise ValueError(f"cache.{part} is {_describe(held)}; {name} and k_slc ask for contiguous {dtype} {list(shape)} on {x.device}")
    if sequences and (x.device.type == "cpu" or os.environ.get("NSA_CHECK") == "1"):
        _check_places(cache, count, tokens)
    return kv_heads


def _check_places(cache: PagedKeysValues, count: int, tokens: int) -> None:
    """What only the device knows."""
    longest, most = int(cache.lengths.max()), cache.pages.shape[1] * tokens
    if int(cache.lengths.min()) < 0 or longest > most:
        raise ValueError(f"cache.lengths goes from {int(cache.lengths.min())} to {longest}; {cache.pages.shape[1]} pages hold 0 … {most} tokens")
    used = cache.pages[torch.arange(cache.pages.shape[1], device=cache.pages.device) * tokens < cache.lengths[:, None]]
    if len(used) and (int(used.min()) < 0 or int(used.max()) >= count):
        raise ValueError(f"cache.pages names pages from {int(used.min())} to {int(used.max())} within the lengths; there are 0 … {count - 1}")


def _describe(x: object) -> str:
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__

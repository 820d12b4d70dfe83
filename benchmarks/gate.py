"""No speed without correctness: a backend against the float64 reference, by the error of plain PyTorch in the same dtype.

Two checks. A pack of several short documents, all of its output and gradients. And the very tensors that will be timed, at a few runs of
neighbouring queries: there the upstream gradient is 0 elsewhere, so every gradient comes from those queries alone, and the reference needs
to compute nothing else. Both sides attend the same blocks; which blocks the backend chooses by itself is compared with the reference's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.counts import num_compressed
from benchmarks.shapes import Heads
from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import nsa_attention

NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
DOCUMENTS = (1, 700, 0, 37, 1310)  # 2,048 tokens
TIMES_PLAIN = 2.0
AGREEMENT = 0.99  # share of (query, key/value head) pairs whose chosen blocks must be the reference's; the rest may be near ties
SCORES = 1 << 28  # scores that the plain version may hold at once

Inputs = tuple[Tensor, ...]  # q, the six keys and values, gates


@dataclass(frozen=True)
class Verdict:
    """`worst` is the largest error over plain PyTorch's, by tensor `worst_of`; `agreement` the share of selections equal to the reference's."""

    passed: bool
    worst: float
    worst_of: str
    agreement: float | None
    problem: str = ""


def random_inputs(heads: Heads, length: int, compressed: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> tuple[Inputs, Tensor]:
    """Normal inputs (gates: their sigmoid) and upstream gradient."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    keys = [normal(rows, heads.hkv, width) for rows in (compressed, length, length) for width in (heads.dk, heads.dv)]
    inputs = (normal(length, heads.hq, heads.dk), *keys, normal(length, heads.hq, 3).sigmoid())
    return inputs, normal(length, heads.hq, heads.dv)


def check_documents(heads: Heads, config: NSAConfig, backend: str, device: torch.device | str, dtype: torch.dtype, lengths: tuple[int, ...]) -> Verdict:
    """A pack of documents, whole."""
    total = sum(lengths)
    inputs, grad = random_inputs(heads, total, sum(num_compressed(length, config) for length in lengths), dtype, device)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    _poison(inputs[0])
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, blocks = nsa_attention(*as_arguments(leaves), config, cu_seqlens=cu, backend=backend, return_blocks=True)
    mine = (out.detach(), *torch.autograd.grad(out, leaves, grad))

    exact = [x.double().requires_grad_() for x in inputs]
    with torch.no_grad():
        _, chosen = nsa_attention(*as_arguments(exact), config, cu_seqlens=cu, backend="reference", return_blocks=True)
    exact_out = _only(nsa_attention(*as_arguments(exact), config, cu_seqlens=cu, blocks=blocks, backend="reference"))
    wanted = (exact_out.detach(), *torch.autograd.grad(exact_out, exact, grad.double()))

    plain = [torch.zeros_like(x) for x in (out, *inputs)]
    compressed = 0
    for start, end in pairwise(cu.tolist()):
        found = num_compressed(end - start, config)
        document = (slice(start, end), *[slice(compressed, compressed + found)] * 2, *[slice(start, end)] * 5)
        compressed += found
        if end > start:
            part = plain_attention(tuple(x[rows] for x, rows in zip(inputs, document, strict=True)), grad[start:end], blocks[start:end], 0, config)
            for target, rows, value in zip(plain, (slice(start, end), *document), part, strict=True):
                target[rows] = value
    return judge(mine, wanted, plain, _agreement(blocks, chosen))


def check_rows(heads: Heads, length: int, config: NSAConfig, backend: str, inputs: Inputs, grad: Tensor, blocks: Tensor | None, places: int = 3) -> Verdict:
    """One document of `length` tokens at `places` runs of neighbouring queries, the last ones among them; `blocks` None: the backend's own choice."""
    count = max(2, min(64, SCORES // (heads.hq * length * places)))
    starts = sorted({max(0, (length - count) * (place + 1) // places) for place in range(places)})
    rows = torch.cat([torch.arange(start, min(start + count, length), device=grad.device) for start in starts]).unique()
    upstream = torch.zeros_like(grad)
    upstream[rows] = grad[rows]
    cu = torch.tensor([0, length], dtype=torch.int32, device=grad.device)
    _poison(inputs[0])
    with torch.no_grad():  # also without a backward in sight, as it is timed
        own_out, own = nsa_attention(*as_arguments(inputs), config, cu_seqlens=cu, backend=backend, return_blocks=True)
    finite = bool(torch.isfinite(own_out).all())
    del own_out
    used = own if blocks is None else blocks
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = _only(nsa_attention(*as_arguments(leaves), config, cu_seqlens=cu, blocks=used, backend=backend))
    grads = torch.autograd.grad(out, leaves, upstream)
    mine = (out.detach()[rows], grads[0][rows], *grads[1:7], grads[7][rows])
    finite = finite and all(bool(torch.isfinite(x).all()) for x in (out, *grads))
    del out, grads, leaves, upstream

    wanted: list[Tensor] = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in mine]
    chosen = []
    at = 0
    for start, size in _runs(rows.tolist()):
        end = start + size
        seen = num_compressed(end, config)
        here, keys, far = slice(start, end), slice(0, end), slice(0, seen)
        cut = (here, far, far, keys, keys, keys, keys, here)
        exact = [x[part].double().requires_grad_() for x, part in zip(inputs, cut, strict=True)]
        tail: dict[str, Any] = {
            "cu_seqlens": torch.tensor([0, size], dtype=torch.int32, device=grad.device),
            "cu_seqlens_k": torch.tensor([0, end], dtype=torch.int32, device=grad.device),
            "backend": "reference",
        }
        with torch.no_grad():
            chosen.append(nsa_attention(*as_arguments(exact), config, **tail, return_blocks=True)[1])
        exact_out = _only(nsa_attention(*as_arguments(exact), config, **tail, blocks=used[here]))
        found = torch.autograd.grad(exact_out, exact, grad[here].double())
        run = slice(at, at + size)
        for target, part, value in zip(wanted, (run, run, *cut[1:7], run), (exact_out.detach(), *found), strict=True):
            target[part] += value
        at += size
        del exact, exact_out, found
    sliced = (inputs[0][rows], *inputs[1:7], inputs[7][rows])
    plain = plain_attention(sliced, grad[rows], used[rows], rows, config)
    verdict = judge(mine, wanted, plain, _agreement(own[rows], torch.cat(chosen)))
    if not finite:
        return Verdict(False, verdict.worst, verdict.worst_of, verdict.agreement, "the output or a gradient is not finite outside the checked queries")
    return verdict


def judge(mine: tuple[Tensor, ...], wanted: tuple[Tensor, ...] | list[Tensor], plain: tuple[Tensor, ...] | list[Tensor], agreement: float | None) -> Verdict:
    """Root-mean-square and largest error of out and eight gradients, each at most twice plain PyTorch's."""
    worst, worst_of = 0.0, "out"
    for name, x, exact, simple in zip(("out", *NAMES), mine, wanted, plain, strict=True):
        if not bool(torch.isfinite(x).all()):
            return Verdict(False, float("inf"), name, agreement, f"{name} is not finite")
        error, yardstick = x.double() - exact, simple.double() - exact
        for measure, value, limit in (
            ("RMS", error.square().mean().sqrt().item(), yardstick.square().mean().sqrt().item()),
            ("largest", error.abs().max().item(), yardstick.abs().max().item()),
        ):
            ratio = value / limit if limit else (0.0 if value == 0 else float("inf"))
            if not ratio <= worst:  # NaN too
                worst, worst_of = ratio, f"{name if name == 'out' else f'gradient of {name}'}, {measure} error"
    if not worst <= TIMES_PLAIN:
        return Verdict(False, worst, worst_of, agreement, f"{worst_of} is {worst:.2f} times that of plain PyTorch")
    if agreement is not None and agreement < AGREEMENT:
        return Verdict(False, worst, worst_of, agreement, f"only {agreement:.1%} of the selections are those of the reference")
    return Verdict(True, worst, worst_of, agreement)


def plain_attention(inputs: Inputs, grad: Tensor, blocks: Tensor, t: Tensor | int, config: NSAConfig) -> tuple[Tensor, ...]:
    """Out and the eight gradients as anyone would first write them for one document: masks over all keys, products in the dtype of the inputs,
    softmax in float32. t: positions of the queries, int64 [rows], or the first one's."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (x.detach().requires_grad_() for x in inputs)
    hkv = k_slc.shape[1]
    t = torch.arange(t, t + len(q), device=q.device) if isinstance(t, int) else t
    key, ends = (torch.arange(len(x), device=q.device) for x in (k_slc, k_cmp))
    causal = key <= t[:, None]
    member = torch.zeros(len(q), hkv, len(key) // config.select_block + 2, dtype=torch.bool, device=q.device)
    member.scatter_(-1, torch.where(blocks < 0, member.shape[-1] - 1, blocks).long(), True)
    masks = (
        (ends * config.compress_stride + config.compress_block <= t[:, None] + 1)[:, None],
        causal[:, None] & member[:, :, key // config.select_block],
        (causal & (key > t[:, None] - config.window))[:, None],
    )
    out, grad_q, grad_gates, of_keys = torch.zeros_like(grad), torch.zeros_like(q), torch.zeros_like(gates), []
    for branch, (k, v) in enumerate(((k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win))):  # one at a time: their scores fill the memory
        mask = masks[branch][:, :, None, :]
        scores = torch.einsum("qhgd,khd->qhgk", q.unflatten(1, (hkv, -1)), k) * q.shape[-1] ** -0.5
        weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1)
        weights = torch.where(mask, weights, 0.0).to(v.dtype)
        gate = gates[..., branch].unflatten(1, (hkv, -1)).to(q.dtype)
        weighed = (gate[..., None] * torch.einsum("qhgk,khd->qhgd", weights, v)).flatten(1, 2)
        found = torch.autograd.grad(weighed, (q, k, v, gates), grad)
        out += weighed.detach()
        grad_q += found[0]
        of_keys += [found[1], found[2]]
        grad_gates += found[3]
    return out, grad_q, *of_keys, grad_gates


def _agreement(mine: Tensor, reference: Tensor) -> float:
    return float((mine == reference).all(-1).float().mean())


def _runs(rows: list[int]) -> list[tuple[int, int]]:
    """(first, count) of each run of neighbours."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs


def _poison(like: Tensor) -> None:
    """Memory that is handed out next holds NaN, so that what a kernel does not write shows."""
    spoilt = [torch.full_like(like, float("nan")) for _ in range(3)]
    del spoilt


def as_arguments(tensors: Inputs | list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = tensors
    return q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates


def _only(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    assert isinstance(out, Tensor)
    return out

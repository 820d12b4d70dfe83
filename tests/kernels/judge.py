"""How the kernels are judged, on a CPU and on a GPU alike: error at most twice plain PyTorch's, unwritten memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nsa_transformer.kernels.dispatch import interpreted

from .cases import NAMES, Case, Result, backward, fresh, plain_attention, run


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN, and integers as large as can be."""
    deterministic, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())  # it fills memory only so; cuBLAS would want an environment variable
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def with_unread_rows(case: Case) -> Case:
    """NaN in three rows past the documents' compressed keys."""

    def longer(x: Tensor) -> Tensor:
        return torch.cat([x, x.new_full((3, *x.shape[1:]), torch.nan)])

    return case.changed(k_cmp=longer(case.inputs.k_cmp), v_cmp=longer(case.inputs.v_cmp))


# Interpreted products are NumPy's, and in which order the machine's BLAS adds them up decides about a third of so small an error: on a GPU the rule is 2.
TIMES = 3 if interpreted() else 2


def check(case: Case, rounding: int = 32, times: float = TIMES) -> Result:
    """Blocks, output and gradients of the Triton backend; rows past the compressed keys get no gradient.

    The float64 reference, which the brute force judges elsewhere, stands in for it: that takes seconds a case. Where plain PyTorch
    happens to be exact, as for softmaxes of one key, `rounding` times the dtype's epsilon of the largest number is allowed; give 0 for
    packs so long that it is not. `times`: of plain PyTorch's error, what is allowed.
    """
    used = len(case.inputs.k_cmp)
    with poisoned():
        result = run(with_unread_rows(case), "triton")
    assert not result.grads.k_cmp[used:].any() and not result.grads.v_cmp[used:].any()
    grads = result.grads._replace(k_cmp=result.grads.k_cmp[:used], v_cmp=result.grads.v_cmp[:used])
    exact = case.to(torch.float64)
    if "blocks" not in case.keywords and len(case.inputs.q):
        chosen = run(exact, "reference").blocks
        assert (chosen == result.blocks).all(-1).double().mean() > 0.99
    best = run(exact.using(blocks=result.blocks), "reference")
    inputs = fresh(case.inputs)
    plain_out = plain_attention(inputs, case, result.blocks)
    plain_grads = backward(plain_out, inputs, case.grad_out)
    allowed = rounding * torch.finfo(case.inputs.q.dtype).eps
    rows = zip(("out", *NAMES), (result.out, *grads), (plain_out.detach(), *plain_grads), (best.out, *best.grads), strict=True)
    for name, mine, plain, expected in rows:
        if expected.numel():
            error, other = (mine.double() - expected).abs(), (plain.double() - expected).abs()
            floor = allowed * max(1.0, expected.abs().max().item())
            assert error.max() <= times * other.max() + floor, f"{name}: largest error {error.max():.3g}, plain PyTorch {other.max():.3g}"
            rms, plain_rms = error.square().mean().sqrt(), other.square().mean().sqrt()
            assert rms <= times * plain_rms + floor / 4, f"{name}: RMS error {rms:.3g}, plain PyTorch {plain_rms:.3g}"
    return result


def selection_of(case: Case) -> tuple[Tensor, Tensor]:
    """By the definition, in float64, for one document: which blocks each query takes, bool [T, Hkv, B], and how narrow the choice was: by which
    share of its own importance the last block taken beats the first left out."""
    config, (q, k_cmp, *_) = case.config, case.to(torch.float64).inputs
    queries, (rows, hkv, width), keys = len(q), k_cmp.shape, len(case.inputs.k_slc)
    t = torch.arange(keys - queries, keys, device=q.device)
    first = torch.arange(rows, device=q.device) * config.compress_stride
    scores = torch.einsum("qhgd,khd->qhgk", q.unflatten(1, (hkv, -1)), k_cmp) * width**-0.5
    scores = scores.masked_fill((first + config.compress_block > t[:, None] + 1)[:, None, None], -torch.inf)
    block = torch.arange(-(-keys // config.select_block), device=q.device)
    start = block * config.select_block
    last = torch.minimum(first[:, None] + config.compress_block, start + config.select_block)
    overlap = (last - torch.maximum(first[:, None], start)).clamp(min=0).double() / config.compress_stride
    importance = scores.softmax(-1).nan_to_num(0.0).sum(2) @ overlap  # [T, Hkv, B]
    own = (t // config.select_block)[:, None, None]
    forced = (block < config.num_initial) | (block > own - config.num_local)
    rank = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    value, index = rank.sort(dim=-1, descending=True, stable=True)
    value, index = value[..., : config.num_selected + 1], index[..., : config.num_selected]
    chosen = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, index, value[..., :-1] > -torch.inf)
    narrow = (value[..., -2] - value[..., -1]) / value[..., -2]
    return chosen, narrow.where(value[..., -1] > -torch.inf, torch.inf).where(value[..., -2] < torch.inf, torch.inf)

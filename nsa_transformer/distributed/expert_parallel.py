"""Expert parallelism: each rank of a group holds a part of the experts, and tokens travel to theirs and back by all-to-all.

`ExpertParallel` is handed in as `MixtureOfExperts.dispatch`. It drops no token, and a rank to which none is sent takes part with no rows.

Shape letters: T tokens of this rank, K experts per token, R = T * K rows to send, R' rows that come here, H hidden width, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _resolve_process_group

from nsa_transformer.config import ConfigError
from nsa_transformer.distributed.world import World
from nsa_transformer.models.moe import Arrive, MixtureOfExperts

_c10d = torch.ops._c10d_functional


class ExpertParallel:
    """The ranks of `group` share one set of experts: rank r of it holds `num_experts / P` of them, the r-th part.

    Called with x `[T, H]`, indices int64 `[T, K]` of all experts and weights `[T, K]`, it sends each token to its experts and returns before they have
    arrived. What it returns waits for them, runs the experts of this rank and brings the results back: y `[T, H]`, rows summed in float32. Every rank of the
    group must call, and differentiate, as often as the others.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        assert num_experts % self.size == 0, (num_experts, self.size)
        self.num_experts, self.num_local = num_experts, num_experts // self.size

    # Compiled code must not hold what has not arrived; both halves are the same few operators without it.
    @torch.compiler.disable
    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor) -> Arrive:
        flat = indices.flatten()
        order = flat.argsort(stable=True)  # by expert, and so by rank
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
        arriving, sizes = _exchange_counts(counts.view(self.size, self.num_local), self.group.group_name)
        sent, received = sizes.tolist()
        out, with_out, back = (_Trip(*way, self.group.group_name) for way in ((sent, received), (sent, received), (received, sent)))
        top_k = indices.shape[1]
        rows = out.start(_Spread.apply(x, order, place, top_k))
        # The weights travel too: so the experts multiply by them, and their gradient needs no copy of the results here.
        row_weights = with_out.start(_Spread.apply(weights.reshape(-1, 1), order, place, 1))

        @torch.compiler.disable
        def arrive(experts: Callable[..., Tensor], w13: Tensor, w2: Tensor) -> Tensor:
            local = torch.arange(self.num_local, device=x.device).repeat(self.size)
            local = local.repeat_interleave(arriving.flatten(), output_size=sum(received))
            # FSDP2 averages gradients over the ranks that hold the same experts, which are fewer than those whose tokens these have seen.
            w13, w2 = (_ScaledGradient.apply(w, 1 / self.size) for w in (w13, w2))
            y = experts(out.end(rows), local[:, None], with_out.end(row_weights), w13, w2)
            return _Gather.apply(back.end(back.start(y)), order, place, top_k)

        return arrive

    def own(self, full: Tensor) -> Tensor:
        """This rank's part `[num_experts / P, …]` of a tensor of all experts."""
        return full.narrow(0, self.rank * self.num_local, self.num_local)

    def whole(self, part: Tensor) -> Tensor:
        """The tensor of all experts `[num_experts, …]`; every rank of the group must call."""
        full = part.new_empty(self.num_experts, *part.shape[1:])
        dist.all_gather(list(full.chunk(self.size)), part.contiguous(), group=self.group)
        return full


def check_expert_parallel(size: int, world: World) -> None:
    """Raises `ConfigError` where `training.expert_parallel_size=size` does not divide the ranks."""
    if world.size % size:
        fits = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        ways = f"write one of {fits}" if world.size > 1 else f"write training.expert_parallel_size=1, or start it with torchrun --nproc_per_node={size}"
        raise ConfigError(f"training.expert_parallel_size={size} does not divide the number of ranks, {world.size}; {ways}")


def open_expert_mesh(size: int, world: World) -> DeviceMesh:
    """`[world / size, size]`: along `expert` lie neighbouring ranks that share one set of experts, along `expert_data` those that hold the same ones.
    Every rank must call."""
    check_expert_parallel(size, world)
    return init_device_mesh(world.device.type, (world.size // size, size), mesh_dim_names=("expert_data", "expert"))


def spread_experts(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Leave each mixture of a model on meta the experts of this rank, and hand in what reaches the others."""
    for mixture in model.modules():
        if isinstance(mixture, MixtureOfExperts):
            mixture.dispatch = dispatch = ExpertParallel(mesh.get_group("expert"), len(mixture.w13))
            mixture.w13, mixture.w2 = (torch.nn.Parameter(torch.empty_like(dispatch.own(w))) for w in (mixture.w13, mixture.w2))


@torch.library.custom_op("nsa_transformer::exchange_counts", mutates_args=())
def _exchange_counts(counts: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Rows for each expert of each rank, int64 [P, E / P], to those that come from each rank to the experts here, the same shape; and on the CPU the rows
    sent to and received from each rank, int64 [2, P]. The one place where the host waits for the device: all-to-all wants lengths."""
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=_resolve_process_group(group))  # type: ignore[arg-type] # the name is a NewType of str
    return arriving, torch.stack([counts.sum(1), arriving.sum(1)]).cpu()


@_exchange_counts.register_fake
def _(counts, group):
    return torch.empty_like(counts), torch.empty(2, counts.shape[0], dtype=torch.int64, device="cpu")


# Recomputing them would wait for the device once more.
KEPT = (torch.ops.nsa_transformer.exchange_counts.default,)


class _Trip:
    """One all-to-all of rows, `sent[p]` of them to and `received[p]` from rank p: `start` returns before they have arrived, `end` waits for them.

    The gradient goes back in the same two steps, so between them, forward and backward, the device is free for other work. Nothing is saved for the backward.
    """

    def __init__(self, sent: list[int], received: list[int], group: str) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.arriving: Tensor | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Rows `[sum(sent), …]`, by rank. What it returns is only for `end`."""
        return _Start.apply(rows, self)

    def end(self, ticket: Tensor) -> Tensor:
        """`[sum(received), …]`, by rank."""
        return _End.apply(ticket, self)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:
        trip.arriving = _c10d.all_to_all_single(rows.contiguous(), trip.received, trip.sent, trip.group)
        # As many rows as were sent, though they take no memory: a gradient of this shape comes back.
        return rows.new_empty(()).expand(rows.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _c10d.wait_tensor(grad), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, trip: _Trip) -> Tensor:
        assert trip.arriving is not None
        rows, trip.arriving = trip.arriving, None
        ctx.trip = trip
        return _c10d.wait_tensor(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        return _c10d.all_to_all_single(grad.contiguous(), trip.sent, trip.received, trip.group), None


class _Spread(torch.autograd.Function):
    """x [T, H] to one row for each of a token's K experts, [R, H], in the order of the experts: row i belongs to pair order[i] = t * K + k, and pair j has row
    place[j]. Its backward is `_Gather`'s forward, a gather with a sum of fixed order, where that of indexing would scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.place, ctx.top_k = place, top_k
        return _spread(x, order, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.place, ctx.top_k), None, None, None


class _Gather(torch.autograd.Function):
    """Rows [R, H] to the sum of each token's K, [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor, top_k: int) -> Tensor:
        ctx.order, ctx.top_k = order, top_k
        return _gather(rows, place, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _spread(grad, ctx.order, ctx.top_k), None, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.scale, None


def _spread(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return x[order // top_k]


def _gather(rows: Tensor, place: Tensor, top_k: int) -> Tensor:
    accumulator = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows[place].unflatten(0, (-1, top_k)).sum(1, dtype=accumulator).to(rows.dtype)

"""AdamW whose masters, moments and gradients live in host memory, updated by the CPU while the GPU goes on.

    one parameter   on the GPU                                in host memory
    matrices        bf16, what autocast would make of them    float32 master, two moments, sum of gradients: 16 bytes
    all others      float32                                   the same

**Gradients** are added up in float32 as each pass makes them: their sums pass through the GPU (`memory/host.py`), so it holds only those under way, and the
host's cores stay with the pass. **Clipping** takes the norm of the whole sums. **The update** goes from the first layer to the last: fused AdamW on a part
of a parameter, then its copy to the GPU, which rounds. The next forward waits for each layer when it comes to it (`Transformer.ready`), so the two
overlap. The update is a queue with one thread, hence its order: no lock is needed, and a failure in it is raised where its result is asked for.
(ZeRO-Offload, arXiv 2101.06840, divides the work alike; there the update of one step may overlap the next at the price of stale weights, here never.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.memory.expert_streaming import host_weights
from nsa_transformer.memory.host import ALIGN, CHUNK, check_host_memory, host_zeros, link_to, norm_of_parts
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.hardware import GIB

HOST_BYTES = 16  # of a parameter: master, two moments, sum of gradients


@dataclass(frozen=True)
class _Piece:
    """A part of a parameter, and of all that belongs to it."""

    parameter: int
    master: Tensor
    grad: Tensor
    moments: tuple[Tensor, Tensor]
    step: Tensor
    target: Tensor  # what passes read


@dataclass(frozen=True)
class _Part:
    """Up to `CHUNK` elements of one parameter group, updated at once."""

    group: int
    pieces: list[_Piece]


class OffloadedAdamW(torch.optim.Optimizer):
    """Fused AdamW with the arithmetic of `torch.optim.AdamW(fused=True)` on float32 parameters and gradients.

    Every backward of the model hands its gradients over at once: `parameter.grad` stays None. A step is: any number of backwards, `clip`, then `step`
    or, to leave everything as it was, nothing; then `zero_grad`. `close` ends the thread.

    Args:
        model: after `use_compute_dtype`, with memory on `device`; what its parameters hold counts for nothing until `publish`.
        groups: as `torch.optim.AdamW` takes them, over all parameters of the model.
        lr, betas, eps: defaults of the groups.
        device: of the model.
        threads: of the update where the device is not the CPU; there torch's own number counts.

    Raises:
        ConfigError: the machine has too little memory.
    """

    def __init__(
        self,
        model: Transformer,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        parameters = list(model.parameters())
        self._device = device
        self._streamed = host_weights(model)
        wanted = HOST_BYTES * sum(p.numel() for p in parameters) + sum(w.nbytes for w in self._streamed.values())
        key = "memory.expert_offloading.enabled" if self._streamed else "memory.optimizer_offloading.enabled"  # the first brings the second with it
        check_host_memory(wanted, f"{key}=true")
        self._link = link_to(device, max(p.numel() for p in parameters), key)
        self._worker = ThreadPoolExecutor(1, "optimizer", initializer=_begin_thread, initargs=(device, threads))
        self._index = {parameter: number for number, parameter in enumerate(parameters)}
        starts, total = [], 0
        for parameter in parameters:
            starts.append(total)
            total += _aligned(parameter.numel())

        def parts(flat: Tensor) -> list[Tensor]:
            return [flat[start : start + p.numel()] for start, p in zip(starts, parameters, strict=True)]

        self._masters, self._grads = parts(self._link.arena(total)), parts(self._link.arena(total))
        self._first, self._second = parts(host_zeros(total)), parts(host_zeros(total))
        self._steps = torch.zeros(len(parameters))
        ends = list(itertools.accumulate(math.ceil(p.numel() / CHUNK) for p in parameters))
        self._parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]  # of each parameter, in norms
        self._norms = torch.zeros(ends[-1], device=device)  # of the sums of gradients, a part at a time
        self._stages = self._plan(model)
        self._updates: dict[nn.Module, Future[torch.cuda.Event | None]] = {}
        self._received: set[int] = set()  # parameters with a gradient in this step
        self._factor = torch.ones(())
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._receive) for parameter in parameters]
        model.ready = self.ready

    def _plan(self, model: Transformer) -> dict[nn.Module, list[_Part]]:
        """What is updated for each part of the model that `Transformer.ready` names, in the order of a forward."""
        stages: dict[nn.Module, list[nn.Parameter]] = {module: list(module.parameters()) for module in (model.embedding, *model.layers, model.norm)}
        if model.head is not None:
            stages[model.norm] += model.head.parameters()
        assert sum(map(len, stages.values())) == len(self._index)
        group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        plan = {}
        for module, parameters in stages.items():
            parts = [part for number in range(len(self.param_groups)) for part in self._split([p for p in parameters if group_of[p] == number], number)]
            plan[module] = parts
        return plan

    def _split(self, parameters: Sequence[nn.Parameter], group: int) -> list[_Part]:
        parts: list[_Part] = []
        room = 0
        for parameter in parameters:
            number = self._index[parameter]
            tensors = self._masters[number], self._grads[number], self._first[number], self._second[number], self._target(parameter)
            for master, grad, first, second, target in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
                if room < _aligned(len(master)):
                    parts.append(_Part(group, []))
                    room = CHUNK
                parts[-1].pieces.append(_Piece(number, master, grad, (first, second), self._steps[number], target))
                room -= _aligned(len(master))
        return parts

    def describe(self) -> str:
        """Where what lives, in a line for the start of a run."""
        count = sum(p.numel() for p in self._index)
        if self._device.type == "cpu":
            return "optimizer in host memory: without a GPU nothing moves; the update runs beside the forward in a thread of its own, with the same results"
        streamed = sum(w.nbytes for w in self._streamed.values())
        held = sum(p.nbytes for p in self._index if p not in self._streamed) / count
        experts = f", and experts, {streamed / GIB:.1f} GiB," if streamed else ""
        return f"optimizer{experts} in host memory, {(HOST_BYTES * count + streamed) / GIB:.1f} GiB; weights on the GPU take {held:.1f} bytes a parameter"

    def _target(self, parameter: nn.Parameter) -> Tensor:
        """What passes read of a parameter, flat."""
        return self._streamed[parameter] if parameter in self._streamed else parameter.detach().flatten()

    # ------------------------------------------------------------------------------------------------- values and moments

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 values of a parameter, in host memory. Whoever writes them calls `publish` next."""
        self.finish()
        return self._masters[self._index[parameter]].view(parameter.shape)

    def host_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """`step`, `exp_avg` and `exp_avg_sq` of a parameter, zeros at first; from now on `state` has them, as after the first update."""
        number = self._index[parameter]
        moments = {"exp_avg": self._first[number].view(parameter.shape), "exp_avg_sq": self._second[number].view(parameter.shape)}
        self.state[parameter] = {"step": self._steps[number], **moments}
        return self.state[parameter]

    def publish(self) -> None:
        """Bring all masters to what passes read."""
        self.finish()
        self._link.begin(self._link.now())
        for parts in self._stages.values():
            for part in parts:
                self._link.to_device((piece.master, piece.target) for piece in part.pieces)
        _wait_for(self._link.sent(), self._device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("OffloadedAdamW keeps its state where it is; write into host_state(parameter) instead")

    # ---------------------------------------------------------------------------------------------------------- gradients

    def _receive(self, parameter: Tensor) -> None:
        """As a hook, once a backward has a parameter's gradient."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None and isinstance(parameter, nn.Parameter)
        number = self._index[parameter]
        self._link.add(grad.detach().flatten(), self._grads[number], self._norms[self._parts[number]], number in self._received)
        self._received.add(number)

    def clip(self, max_norm: float) -> Tensor:
        """The global norm of the gradients, float32 on the CPU; `step` scales them down to `max_norm` as `torch.nn.utils.clip_grad_norm_` would."""
        with self._link.standing_still():
            self._link.settle()
        norms = self._norms.cpu()
        found = [norm_of_parts(norms[self._parts[number]]) for number in sorted(self._received)]
        total = torch.linalg.vector_norm(torch.stack(found)) if found else torch.zeros(())
        self._factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step, `step` or not."""
        self._link.settle()
        self._received, self._factor = set(), torch.ones(())

    # ------------------------------------------------------------------------------------------------------------- update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Begin the update; it goes on while the next forward waits for each layer as it comes to it."""
        assert closure is None
        self._link.settle()
        self.finish()
        received = frozenset(self._received)
        for parameter, number in self._index.items():
            if number in received:
                self._steps[number] += 1
                if parameter not in self.state:
                    self.host_state(parameter)
        options = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in self.param_groups]
        ready = self._link.now()
        for module, parts in self._stages.items():
            self._updates[module] = self._worker.submit(self._update, parts, options, received, self._factor, ready)

    def _update(
        self, parts: list[_Part], options: list[dict[str, Any]], received: frozenset[int], factor: Tensor, ready: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        self._link.begin(ready)
        clipped = bool(factor < 1)
        for part in parts:
            pieces = [piece for piece in part.pieces if piece.parameter in received]
            if not pieces:
                continue
            if clipped:  # the sums themselves, which are of no use after this. `grad_scale` would divide, which rounds otherwise than torch's clipping
                for piece in pieces:
                    piece.grad.mul_(factor)
            option = options[part.group]
            torch._fused_adamw_(
                [piece.master for piece in pieces],
                [piece.grad for piece in pieces],
                [piece.moments[0] for piece in pieces],
                [piece.moments[1] for piece in pieces],
                [],
                [piece.step for piece in pieces],
                lr=option["lr"],
                beta1=option["betas"][0],
                beta2=option["betas"][1],
                weight_decay=option["weight_decay"],
                eps=option["eps"],
                amsgrad=False,
                maximize=False,
            )
            self._link.to_device((piece.master, piece.target) for piece in pieces)
        return self._link.sent()

    def ready(self, module: nn.Module) -> None:
        """Before a pass reads the weights of a part of the model: wait for what is still being done to them."""
        update = self._updates.pop(module, None)
        if update is not None:
            with self._link.standing_still():
                _wait_for(update.result(), self._device)

    def waited(self) -> float:
        """Seconds that the device has stood still for gradients to be added up and weights to be updated, since this was last asked; it must have
        passed all of that."""
        return self._link.waited()

    def finish(self) -> None:
        """Until no update is under way."""
        for module in list(self._updates):
            self.ready(module)

    def close(self) -> None:
        """End the thread after what it is doing now; what waits behind that is given up. The model is a plain one again."""
        self._worker.shutdown(cancel_futures=True)
        self._updates.clear()
        for hook in self._hooks:
            hook.remove()


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGN) * ALIGN


def _begin_thread(device: torch.device, threads: int) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_num_threads(threads)


def _wait_for(event: torch.cuda.Event | None, device: torch.device) -> None:
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def master_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """The float32 values that an optimizer trains: the parameter itself, or its master in host memory."""
    return optimizer.master(parameter) if isinstance(optimizer, OffloadedAdamW) else parameter

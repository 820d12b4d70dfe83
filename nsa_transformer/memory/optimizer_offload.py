"""AdamW whose masters, moments and gradients live in host memory, updated by the host and the GPU together while the next forward goes on.

    one parameter   on the GPU                                in host memory
    matrices        bf16, what autocast would make of them    float32 master, two moments, sum of gradients: 16 bytes
    all others      float32                                   the same

**Gradients** are added up in float32, a layer's as soon as a pass has made them: their sums pass through the GPU (`memory/cuda_link.py`), so it holds only
those under way, and the host's cores stay with the pass. **Clipping** takes the norm of the whole sums. **The update** goes from the first layer to the last,
and each layer's parts are divided: the host updates its own with fused AdamW and sends them to the GPU, which rounds; the others go to the GPU, are updated
there and come back. Which is whose the model alone decides (`_divide`). The next forward waits for each layer when it comes to it (`Transformer.ready`), and
the host for what comes back where it reads it (`finish`). The update is two queues with a thread each, hence its order: no lock is needed, and a failure in it
is raised where its result is asked for.
(ZeRO-Offload, arXiv 2101.06840, keeps the same in host memory; there the update of one step may overlap the next at the price of stale weights, here never.)
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.memory.cuda_link import link_to
from nsa_transformer.memory.expert_streaming import host_weights
from nsa_transformer.memory.host import ALIGN, CHUNK, Part, Piece, adamw, check_host_memory, norm_of_parts, part_size
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.hardware import GIB

HOST_BYTES = 16  # of a parameter: master, two moments, sum of gradients
AHEAD = 2  # layers whose gradients may wait to be launched: what waits is memory, which the link counts only once it is launched


@dataclass(frozen=True, eq=False)
class _Stage:
    """What is updated before a pass reads a part of the model."""

    parameters: frozenset[int]
    parts: list[Part]
    on_device: list[Part]  # of the parts
    on_host: list[Part]  # all others, cut to `CHUNK`


@dataclass(frozen=True)
class _Update:
    """What one step does in all stages."""

    options: list[dict[str, Any]]  # by group
    received: frozenset[int]  # parameters that have a gradient
    factor: float  # of all gradients
    ready: torch.cuda.Event | None  # behind the last pass

    def of(self, parts: list[Part]) -> list[Part]:
        """The pieces that have a gradient."""
        with_gradient = (replace(part, pieces=[piece for piece in part.pieces if piece.parameter in self.received]) for part in parts)
        return [part for part in with_gradient if part.pieces]


class OffloadedAdamW(torch.optim.Optimizer):
    """Fused AdamW with the arithmetic of `torch.optim.AdamW(fused=True)` on float32 parameters and gradients.

    Every backward of the model hands its gradients over at once: `parameter.grad` stays None. A step is: any number of backwards, `clip`, then `step`
    or, to leave everything as it was, nothing; then `zero_grad`. `close` ends the threads.

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
        self._index = {parameter: number for number, parameter in enumerate(parameters)}
        order = self._order(model)
        # In the order of the update, so that what is updated at once lies together.
        starts, total = {}, 0
        for parameter in itertools.chain.from_iterable(itertools.chain.from_iterable(order.values())):
            starts[parameter] = total
            total += math.ceil(parameter.numel() / ALIGN) * ALIGN
        self._size = part_size(total)
        self._link = link_to(device, min(self._size, total), len(parameters), key)
        # Two threads: beside the host's updates, what the device is to do would be launched late. The second one also launches the adding up of gradients,
        # whose calls would otherwise hold up those of the backward, by 35 ms a pass of `large` on an H200.
        self._worker = ThreadPoolExecutor(1, "optimizer", initializer=_begin_thread, initargs=(device, threads))
        self._launcher = ThreadPoolExecutor(1, "optimizer_link", initializer=_begin_thread, initargs=(device, None))
        arenas = [self._link.arena(total) for _ in range(4)]
        self._masters, self._grads, self._first, self._second = ([flat[starts[p] : starts[p] + p.numel()] for p in parameters] for flat in arenas)
        self._steps = self._link.arena(len(parameters))
        norm = itertools.count()
        self._stages = self._divide(
            {
                module: [part for group, members in enumerate(groups) for part in self._split(group, members, starts, arenas, norm)]
                for module, groups in order.items()
            }
        )
        self._stage_of = {number: stage for stage in self._stages.values() for number in stage.parameters}
        norms = [(piece.parameter, piece.norm) for stage in self._stages.values() for part in stage.parts for piece in part.pieces]
        self._norms = torch.zeros(len(norms), device=device)  # of the sums of gradients, by pieces
        self._norms_of = {number: [at for parameter, at in norms if parameter == number] for number in range(len(parameters))}
        self._updates: dict[nn.Module, tuple[Future[torch.cuda.Event | None], ...]] = {}
        self._pending: dict[int, Tensor] = {}  # gradients of a stage, until all of them are there
        self._received: set[int] = set()  # parameters whose sums have a gradient of this step
        self._adding: deque[Future[None]] = deque()  # in the order of the hand-overs
        self._factor = 1.0
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._receive) for parameter in parameters]
        self._model, self._ready_before = model, model.ready
        model.ready = self.ready

    def _order(self, model: Transformer) -> dict[nn.Module, list[list[nn.Parameter]]]:
        """The parts of the model that `Transformer.ready` names, in the order of a forward; of each its parameters, by group."""
        stages: dict[nn.Module, list[nn.Parameter]] = {module: list(module.parameters()) for module in (model.embedding, *model.layers, model.norm)}
        if model.head is not None:
            stages[model.norm] += model.head.parameters()
        assert sum(map(len, stages.values())) == len(self._index)
        group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        return {module: [[p for p in found if group_of[p] == number] for number in range(len(self.param_groups))] for module, found in stages.items()}

    def _split(self, group: int, parameters: list[nn.Parameter], starts: dict[nn.Parameter, int], arenas: list[Tensor], norm: Iterator[int]) -> list[Part]:
        """Parameters that lie one behind the other."""
        parts: list[tuple[int, list[Piece]]] = []  # where each begins
        for parameter in parameters:
            first = start = starts[parameter]
            for target in self._target(parameter).split(self._size):
                end = start + len(target)
                if not parts or end - parts[-1][0] > self._size:
                    parts.append((start, []))
                begin, pieces = parts[-1]
                pieces.append(Piece(self._index[parameter], slice(start - begin, end - begin), slice(start - first, end - first), target, next(norm)))
                start = end
        return [Part(group, pieces, *(flat[begin : begin + pieces[-1].at.stop] for flat in arenas)) for begin, pieces in parts]

    def _divide(self, stages: dict[nn.Module, list[Part]]) -> dict[nn.Module, _Stage]:
        """Between host and device, by the plan alone, such that both come to the end of a stage together. What is streamed stays with the host."""
        streamed = {self._index[parameter] for parameter in self._streamed}
        divided, before, taken = {}, 0, 0  # elements up to here, and the device's of them
        for module, parts in stages.items():
            on_device: list[Part] = []
            on_host: list[Part] = []
            for part in parts:
                before += len(part.master)
                if taken < self._link.share * before and streamed.isdisjoint(piece.parameter for piece in part.pieces):
                    taken += len(part.master)
                    on_device.append(part)
                else:
                    on_host += part.cut(CHUNK)
            divided[module] = _Stage(frozenset(piece.parameter for part in parts for piece in part.pieces), parts, on_device, on_host)
        return divided

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
        """`step`, `exp_avg` and `exp_avg_sq` of a parameter, zeros at first; from now on `state` has them, as after the first update. After a step `state` may
        be read once `finish`, `master` or this has been called."""
        self.finish()
        number = self._index[parameter]
        moments = {"exp_avg": self._first[number].view(parameter.shape), "exp_avg_sq": self._second[number].view(parameter.shape)}
        self.state[parameter] = {"step": self._steps[number], **moments}
        return self.state[parameter]

    def publish(self) -> None:
        """Bring all masters to what passes read."""
        self.finish()
        self._link.begin(self._link.now())
        for stage in self._stages.values():
            for part in itertools.chain(*(part.cut(CHUNK) for part in stage.parts)):
                self._link.to_device((part.master[piece.at], piece.target) for piece in part.pieces)
        _wait_for(self._link.sent(), self._device)

    def state_dict(self) -> dict[str, Any]:
        self.finish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("OffloadedAdamW keeps its state where it is; write into host_state(parameter) instead")

    # ---------------------------------------------------------------------------------------------------------- gradients

    def _receive(self, parameter: Tensor) -> None:
        """As a hook, once a backward has a parameter's gradient. A stage's are handed over together, in few parts."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None and isinstance(parameter, nn.Parameter)
        self._join()  # after a whole forward there is nothing to wait for
        number = self._index[parameter]
        stage = self._stage_of[number]
        if number in self._pending or not stage.parameters.issuperset(self._pending):
            self._hand_over()
        self._pending[number] = grad.detach().flatten()
        if len(self._pending) == len(stage.parameters):
            self._hand_over()

    def _hand_over(self) -> None:
        if not self._pending:
            return
        grads, self._pending = self._pending, {}
        stage = self._stage_of[next(iter(grads))]
        coming = [(part, [(piece, grads[piece.parameter][piece.of]) for piece in part.pieces if piece.parameter in grads]) for part in stage.parts]
        given = [each for each in coming if each[1]], self._norms, frozenset(self._received), self._link.behind()
        self._received |= grads.keys()
        if not self._link.beside:
            self._link.add(*given)
            return
        while len(self._adding) >= AHEAD:
            self._adding.popleft().result()
        self._adding.append(self._launcher.submit(self._link.add, *given))

    def _added(self) -> None:
        """Until all that was handed over has been given to the device."""
        while self._adding:
            self._adding.popleft().result()

    def clip(self, max_norm: float) -> Tensor:
        """The global norm of the gradients, float32 on the CPU; `step` scales them down to `max_norm` as `torch.nn.utils.clip_grad_norm_` would."""
        self._hand_over()
        self._added()
        with self._link.standing_still():
            self._link.settle()
        norms = self._norms.cpu()
        found = norms[[self._norms_of[number][0] for number in sorted(self._received)]]
        for place, number in enumerate(sorted(self._received)):
            if len(self._norms_of[number]) > 1:
                found[place] = norm_of_parts(norms[self._norms_of[number]])
        total = torch.linalg.vector_norm(found) if self._received else torch.zeros(())
        self._factor = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step, `step` or not."""
        self._added()
        self._link.settle()
        self._pending, self._received, self._factor = {}, set(), 1.0

    # ------------------------------------------------------------------------------------------------------------- update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Begin the update; it goes on while the next forward waits for each layer as it comes to it."""
        assert closure is None
        self._hand_over()
        self.finish()
        self._steps[list(self._received)] += 1
        for parameter, number in self._index.items():
            if number in self._received and parameter not in self.state:
                self.host_state(parameter)
        options = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in self.param_groups]
        update = _Update(options, frozenset(self._received), self._factor, self._link.now())
        self._link.begin_update(self._steps, update.ready)
        for module, stage in self._stages.items():
            on_device = self._launcher.submit(self._launch, update.of(stage.on_device), update)
            self._updates[module] = on_device, self._worker.submit(self._update, update.of(stage.on_host), update)

    def _launch(self, parts: list[Part], update: _Update) -> torch.cuda.Event | None:
        for part in parts:
            self._link.update(part, update.options[part.group], update.factor)
        return self._link.updated()

    def _update(self, parts: list[Part], update: _Update) -> torch.cuda.Event | None:
        self._link.begin(update.ready)
        for part in parts:
            adamw(part, self._steps, update.options[part.group], update.factor)
            self._link.to_device((part.master[piece.at], piece.target) for piece in part.pieces)
        return self._link.sent()

    def ready(self, module: nn.Module) -> None:
        """Before a pass reads the weights of a part of the model: wait for what is still being done to them."""
        updates = self._updates.pop(module, ())
        if updates:
            with self._link.standing_still():
                for update in updates:
                    _wait_for(update.result(), self._device)

    def waited(self) -> float:
        """Seconds that the device has stood still for gradients to be added up and weights to be updated, since this was last asked; it must have
        passed all of that."""
        return self._link.waited()

    def _join(self) -> None:
        """Until the thread has nothing to do, and for the device until all weights are written."""
        for module in list(self._updates):
            self.ready(module)

    def finish(self) -> None:
        """Until no update is under way, and what the device updated or added up has come back."""
        self._join()
        self._added()
        self._link.finish()

    def close(self) -> None:
        """End the threads after what they are doing now; what waits behind that is given up. The model is a plain one again, and holds none of this."""
        for thread in (self._launcher, self._worker):
            thread.shutdown(cancel_futures=True)
        self._updates.clear()
        self._adding.clear()
        for hook in self._hooks:
            hook.remove()
        self._model.ready = self._ready_before
        self._link.finish()


def _begin_thread(device: torch.device, threads: int | None) -> None:
    """`threads`: of one alone. torch gives the number that was set last, by whatever thread, to each thread that computes for the first time."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if threads is not None:
            torch.set_num_threads(threads)


def _wait_for(event: torch.cuda.Event | None, device: torch.device) -> None:
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def master_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """The float32 values that an optimizer trains: the parameter itself, or its master in host memory."""
    return optimizer.master(parameter) if isinstance(optimizer, OffloadedAdamW) else parameter

"""AdamW whose masters, moments and gradients live in host memory, updated by the host and the GPU together while the next forward goes on.

    one parameter   on the GPU                                in host memory
    matrices        bf16, what autocast would make of them    float32 master, two moments, sum of gradients: 16 bytes
    all others      float32                                   the same

**Gradients** are added up in float32 as each pass makes them: their sums pass through the GPU (`memory/cuda_link.py`), so it holds only those under way,
and the host's cores stay with the pass. **Clipping** takes the norm of the whole sums. **The update** goes from the first layer to the last, and each layer's
parts are divided: the host updates its own with fused AdamW and sends them to the GPU, which rounds; the others go to the GPU, are updated there and come
back. Which is whose the model alone decides (`_divide`). The next forward waits for each layer when it comes to it (`Transformer.ready`), and the host for
what comes back where it reads it (`finish`). The update is a queue with one thread, hence its order: no lock is needed, and a failure in it is raised
where its result is asked for.
(ZeRO-Offload, arXiv 2101.06840, keeps the same in host memory; there the update of one step may overlap the next at the price of stale weights, here never.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.memory.cuda_link import link_to
from nsa_transformer.memory.expert_streaming import host_weights
from nsa_transformer.memory.host import ALIGN, CHUNK, Part, Piece, adamw, check_host_memory, norm_of_parts
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.hardware import GIB

HOST_BYTES = 16  # of a parameter: master, two moments, sum of gradients


@dataclass(frozen=True)
class _Stage:
    """What is updated before a pass reads a part of the model."""

    on_device: list[Part]
    on_host: list[Part]


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
        self._index = {parameter: number for number, parameter in enumerate(parameters)}
        order = self._order(model)
        # In the order of the update, so that what is updated at once lies together.
        starts, total = {}, 0
        for parameter in itertools.chain.from_iterable(itertools.chain.from_iterable(order.values())):
            starts[parameter] = total
            total += math.ceil(parameter.numel() / ALIGN) * ALIGN
        self._link = link_to(device, total, len(parameters), key)
        self._worker = ThreadPoolExecutor(1, "optimizer", initializer=_begin_thread, initargs=(device, threads))
        arenas = [self._link.arena(total) for _ in range(4)]
        self._masters, self._grads, self._first, self._second = ([flat[starts[p] : starts[p] + p.numel()] for p in parameters] for flat in arenas)
        self._steps = self._link.arena(len(parameters))
        ends = list(itertools.accumulate(math.ceil(p.numel() / CHUNK) for p in parameters))
        self._parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]  # of each parameter, in norms
        self._norms = torch.zeros(ends[-1], device=device)  # of the sums of gradients, a part at a time
        self._stages = self._divide({module: [self._split(*each, starts, arenas) for each in enumerate(groups)] for module, groups in order.items()})
        self._updates: dict[nn.Module, Future[tuple[torch.cuda.Event | None, ...]]] = {}
        self._received: set[int] = set()  # parameters with a gradient in this step
        self._factor = 1.0
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._receive) for parameter in parameters]
        model.ready = self.ready

    def _order(self, model: Transformer) -> dict[nn.Module, list[list[nn.Parameter]]]:
        """The parts of the model that `Transformer.ready` names, in the order of a forward; of each its parameters, by group."""
        stages: dict[nn.Module, list[nn.Parameter]] = {module: list(module.parameters()) for module in (model.embedding, *model.layers, model.norm)}
        if model.head is not None:
            stages[model.norm] += model.head.parameters()
        assert sum(map(len, stages.values())) == len(self._index)
        group_of = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        return {module: [[p for p in found if group_of[p] == number] for number in range(len(self.param_groups))] for module, found in stages.items()}

    def _split(self, group: int, parameters: list[nn.Parameter], starts: dict[nn.Parameter, int], arenas: list[Tensor]) -> list[Part]:
        """Parameters that lie one behind the other."""
        parts: list[tuple[int, list[Piece]]] = []  # where each begins
        for parameter in parameters:
            start = starts[parameter]
            for target in self._target(parameter).split(CHUNK):
                end = start + len(target)
                if not parts or end - parts[-1][0] > CHUNK:
                    parts.append((start, []))
                begin, pieces = parts[-1]
                pieces.append(Piece(self._index[parameter], slice(start - begin, end - begin), target))
                start = end
        return [Part(group, pieces, *(flat[begin : begin + pieces[-1].at.stop] for flat in arenas)) for begin, pieces in parts]

    def _divide(self, stages: dict[nn.Module, list[list[Part]]]) -> dict[nn.Module, _Stage]:
        """Between host and device, by the plan alone, such that both come to the end of a stage together. What is streamed stays with the host."""
        streamed = {self._index[parameter] for parameter in self._streamed}
        divided, before, taken = {}, 0, 0  # elements up to here, and the device's of them
        for module, groups in stages.items():
            divided[module] = stage = _Stage([], [])
            for part in itertools.chain.from_iterable(groups):
                before += len(part.master)
                if taken < self._link.share * before and streamed.isdisjoint(piece.parameter for piece in part.pieces):
                    taken += len(part.master)
                    stage.on_device.append(part)
                else:
                    stage.on_host.append(part)
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
            for part in (*stage.on_device, *stage.on_host):
                self._link.to_device((part.master[piece.at], piece.target) for piece in part.pieces)
        _wait_for(self._link.sent(), self._device)

    def state_dict(self) -> dict[str, Any]:
        self.finish()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise ValueError("OffloadedAdamW keeps its state where it is; write into host_state(parameter) instead")

    # ---------------------------------------------------------------------------------------------------------- gradients

    def _receive(self, parameter: Tensor) -> None:
        """As a hook, once a backward has a parameter's gradient."""
        grad, parameter.grad = parameter.grad, None
        assert grad is not None and isinstance(parameter, nn.Parameter)
        self._join()  # after a whole forward there is nothing to wait for
        number = self._index[parameter]
        self._link.add(grad.detach().flatten(), self._grads[number], self._norms[self._parts[number]], number in self._received)
        self._received.add(number)

    def clip(self, max_norm: float) -> Tensor:
        """The global norm of the gradients, float32 on the CPU; `step` scales them down to `max_norm` as `torch.nn.utils.clip_grad_norm_` would."""
        with self._link.standing_still():
            self._link.settle()
        norms = self._norms.cpu()
        found = norms[[parts.start for parts in self._parts]]
        for number, parts in enumerate(self._parts):
            if parts.stop - parts.start > 1:
                found[number] = norm_of_parts(norms[parts])
        total = torch.linalg.vector_norm(found[sorted(self._received)]) if self._received else torch.zeros(())
        self._factor = float((max_norm / (total + 1e-6)).clamp(max=1.0))
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step, `step` or not."""
        self._link.settle()
        self._received, self._factor = set(), 1.0

    # ------------------------------------------------------------------------------------------------------------- update

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Begin the update; it goes on while the next forward waits for each layer as it comes to it."""
        assert closure is None
        self.finish()
        self._steps[list(self._received)] += 1
        for parameter, number in self._index.items():
            if number in self._received and parameter not in self.state:
                self.host_state(parameter)
        options = [{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")} for group in self.param_groups]
        update = _Update(options, frozenset(self._received), self._factor, self._link.now())
        stages = list(self._stages.items())
        launched = self._worker.submit(self._launch, stages[0][1], update)
        for (module, stage), following in zip(stages, [*stages[1:], None], strict=True):
            # The device has its parts of the next stage before the host begins with this one's, and is not idle where the host is the slower.
            ahead = self._worker.submit(self._launch, following[1], update) if following is not None else launched
            self._updates[module] = self._worker.submit(self._update, stage, update, launched)
            launched = ahead

    def _launch(self, stage: _Stage, update: _Update) -> torch.cuda.Event | None:
        return self._link.update(update.of(stage.on_device), self._steps, update.options, update.factor, update.ready)

    def _update(self, stage: _Stage, update: _Update, launched: Future[torch.cuda.Event | None]) -> tuple[torch.cuda.Event | None, torch.cuda.Event | None]:
        on_device = launched.result()  # which came before this in the queue
        self._link.begin(update.ready)
        for part in update.of(stage.on_host):
            adamw(part, self._steps, update.options[part.group], update.factor)
            self._link.to_device((part.master[piece.at], piece.target) for piece in part.pieces)
        return on_device, self._link.sent()

    def ready(self, module: nn.Module) -> None:
        """Before a pass reads the weights of a part of the model: wait for what is still being done to them."""
        update = self._updates.pop(module, None)
        if update is not None:
            with self._link.standing_still():
                for event in update.result():
                    _wait_for(event, self._device)

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
        self._link.finish()

    def close(self) -> None:
        """End the thread after what it is doing now; what waits behind that is given up. The model is a plain one again."""
        self._worker.shutdown(cancel_futures=True)
        self._updates.clear()
        for hook in self._hooks:
            hook.remove()
        self._link.finish()


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

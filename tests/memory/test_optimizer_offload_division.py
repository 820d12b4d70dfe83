"""The update divided between host and device: who takes what, and who waits for whom. The device is one that does nothing before it must."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa_transformer.config import TrainingConfig
from nsa_transformer.distributed.parallelize import build_model
from nsa_transformer.distributed.world import World
from nsa_transformer.memory import cuda_link, optimizer_offload
from nsa_transformer.memory.expert_streaming import host_weights
from nsa_transformer.memory.host import Part
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.optimizer import build_optimizer, clip

from ..models.small import small_config as small_model_config
from ..runs import QUIET, small_config, write_corpus
from .stand_ins import Lagging, small_parts, stand_in_for_cuda

CPU = World(0, 1, torch.device("cpu"), None)
RATES = TrainingConfig(learning_rate=0.01)


def new_model() -> Transformer:
    model = Transformer(small_model_config(vocab_size=61))
    model.init_weights(0)
    return model


def offloaded(device: torch.device) -> tuple[Transformer, OffloadedAdamW]:
    model = new_model().to(device)
    optimizer = build_optimizer(model, RATES, device)
    assert isinstance(optimizer, OffloadedAdamW)
    for parameter, value in zip(model.parameters(), new_model().parameters(), strict=True):
        optimizer.master(parameter).copy_(value.detach())
    optimizer.publish()
    return model, optimizer


def lagging(
    monkeypatch: pytest.MonkeyPatch, link: type[cuda_link.CudaLink] = cuda_link.CudaLink, seed: int | None = None
) -> tuple[Transformer, OffloadedAdamW]:
    small_parts(monkeypatch, 64)
    Lagging(seed).stand_in(monkeypatch)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    monkeypatch.setattr(optimizer_offload, "link_to", link)
    return offloaded(torch.device("cpu"))


def backward(model: Transformer, grads: list[Tensor] | None = None) -> None:
    """Given gradients, or ones, and no forward that would wait for an update."""
    parameters = list(model.parameters())
    grads = [torch.ones_like(p) for p in parameters] if grads is None else grads
    torch.stack([(p * grad).sum() for p, grad in zip(parameters, grads, strict=True)]).sum().backward()


def step(model: Transformer, optimizer: torch.optim.Optimizer, max_norm: float | None = 1e9) -> None:
    backward(model)
    if max_norm is not None:
        clip(model, optimizer, max_norm, CPU)
    optimizer.step()
    optimizer.zero_grad()


def done(optimizer: OffloadedAdamW) -> None:
    """The threads have nothing to do any more."""
    for update in itertools.chain(*optimizer._updates.values()):
        update.result()


def stages(optimizer: OffloadedAdamW) -> list[optimizer_offload._Stage]:
    return list(optimizer._stages.values())


def size(parts: list[Part]) -> int:
    return sum(len(part.master) for part in parts)


# ------------------------------------------------------------------------------------------------------- who takes what


def test_host_and_device_divide_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, always alike, and such that the device has its share of what there is up to the end of each."""
    divided = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            model, optimizer = lagging(patch)
        found = torch.zeros(len(optimizer._masters))
        before = taken = 0
        for stage in stages(optimizer):
            for part in (*stage.on_device, *stage.on_host):
                assert part.pieces[-1].at.stop <= len(part.master) <= 64 and len({len(tensor) for tensor in part.tensors}) == 1
                for piece in part.pieces:
                    found[piece.parameter] += piece.at.stop - piece.at.start
            before += size(stage.on_device) + size(stage.on_host)
            taken += size(stage.on_device)
            assert taken == pytest.approx(cuda_link.DEVICE_SHARE * before, abs=64)
        assert found.tolist() == [p.numel() for p in model.parameters()]
        divided.append([[[(p.group, [(e.parameter, e.at) for e in p.pieces]) for p in side] for side in (s.on_device, s.on_host)] for s in stages(optimizer)])
        optimizer.close()
    assert divided[0] == divided[1]


def test_on_a_cpu_all_is_the_hosts() -> None:
    _, optimizer = offloaded(torch.device("cpu"))
    assert all(not stage.on_device and stage.on_host for stage in stages(optimizer))
    optimizer.close()


def test_what_is_streamed_stays_with_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the rest the device takes as much as its share of all."""
    small_parts(monkeypatch, 64)
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    monkeypatch.setattr(optimizer_offload, "link_to", cuda_link.CudaLink)
    write_corpus(tmp_path / "text")
    config = small_config(tmp_path, *QUIET, "memory.expert_offloading.enabled=true")
    model = build_model(config, CPU)
    optimizer = build_optimizer(model, config.training, torch.device("cpu"))
    assert isinstance(optimizer, OffloadedAdamW)
    streamed = {optimizer._index[parameter] for parameter in host_weights(model)}
    on_device = [part for stage in stages(optimizer) for part in stage.on_device]
    assert streamed and streamed.isdisjoint(piece.parameter for part in on_device for piece in part.pieces)
    every = size(on_device) + size([part for stage in stages(optimizer) for part in stage.on_host])
    assert 0.3 * every < size(on_device) <= 0.56 * every
    optimizer.close()


# -------------------------------------------------------------------------------------------------- who waits for whom


READERS: dict[str, Callable[[OffloadedAdamW, nn.Parameter], object]] = {
    "master": lambda optimizer, parameter: optimizer.master(parameter),
    "host_state": lambda optimizer, parameter: optimizer.host_state(parameter),
    "state_dict": lambda optimizer, parameter: optimizer.state_dict(),
    "publish": lambda optimizer, parameter: optimizer.publish(),
    "finish": lambda optimizer, parameter: optimizer.finish(),
    "close": lambda optimizer, parameter: optimizer.close(),
}


@pytest.mark.parametrize("what", READERS)
def test_who_reads_on_the_host_waits_for_what_comes_back(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    plain = new_model()
    reference = build_optimizer(plain, RATES)
    model, optimizer = lagging(monkeypatch)
    for _ in range(2):
        step(plain, reference)
        step(model, optimizer)
    done(optimizer)  # `close` gives up what has not begun
    number = next(part for stage in reversed(stages(optimizer)) for part in reversed(stage.on_device)).pieces[-1].parameter  # the last to come back
    parameter, wanted = (list(each.parameters())[number] for each in (model, plain))
    master, state = optimizer._masters[optimizer._index[parameter]].view_as(wanted), optimizer.state[parameter]
    assert not torch.equal(master, wanted) and not torch.equal(state["exp_avg"], reference.state[wanted]["exp_avg"]), "or the device does not lag"
    READERS[what](optimizer, parameter)
    assert torch.equal(master, wanted)
    assert all(torch.equal(state[key], reference.state[wanted][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    if what == "publish":
        assert all(map(torch.equal, model.parameters(), plain.parameters()))
    optimizer.close()


def test_a_step_without_clipping_waits_for_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not scale them as the step before did."""
    plain = new_model()
    reference = build_optimizer(plain, RATES)
    model, optimizer = lagging(monkeypatch)
    for max_norm in (0.1, None):
        step(plain, reference, max_norm)
        step(model, optimizer, max_norm)
    for parameter, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(optimizer.master(parameter), wanted.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], reference.state[wanted]["exp_avg"])
    optimizer.close()


def test_gradients_that_are_given_up_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = lagging(monkeypatch)
    backward(model)
    link = optimizer._link
    optimizer._added()
    assert isinstance(link, cuda_link.CudaLink) and link._held
    optimizer.zero_grad()
    assert not link._held
    optimizer.close()


def test_a_backward_without_a_forward_waits_for_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums take the rooms that it hands out."""
    added: list[int] = []

    class Watched(cuda_link.CudaLink):
        def add(self, *arguments: Any) -> None:
            added.append(len(optimizer._updates))
            super().add(*arguments)

    model, optimizer = lagging(monkeypatch, Watched)
    for _ in range(2):
        step(model, optimizer)
    assert len(added) == 2 * len(optimizer._stages) and not any(added)
    optimizer.close()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("apart", [False, True], ids=["one memory", "apart"])
def test_gradients_come_in_any_order_and_number(monkeypatch: pytest.MonkeyPatch, apart: bool, seed: int) -> None:
    """Those of some parameters in one pass, of others in the next, twice, given up between passes, not finite: to the last bit what torch makes of it."""
    small_parts(monkeypatch, 64)
    monkeypatch.setattr(cuda_link, "IN_FLIGHT", 1 << 12)
    plain = new_model()
    reference = build_optimizer(plain, RATES)
    model, optimizer = lagging(monkeypatch, seed=seed) if apart else offloaded(CPU.device)
    draw, pairs = random.Random(seed), list(zip(model.parameters(), plain.parameters(), strict=True))
    for _ in range(6):
        live = draw.sample(pairs, draw.randint(1, len(pairs)))  # all others are as good as frozen
        for _ in range(draw.randint(1, 4)):
            chosen = draw.sample(live, draw.randint(1, len(live)))
            grads = [torch.randn_like(p) for p, _ in chosen]
            if draw.random() < 0.15:
                grads[0].view(-1)[0] = torch.nan
            for which in range(2):
                torch.stack([(pair[which] * grad).sum() for pair, grad in zip(chosen, grads, strict=True)]).sum().backward()
            if draw.random() < 0.15:
                plain.zero_grad()
                optimizer.zero_grad()
        known = [p.grad for p in plain.parameters() if p.grad is not None]
        finite = all(bool(grad.isfinite().all()) for grad in known)
        if known and draw.random() < 0.8:
            for _ in range(draw.randint(1, 2)):
                norms = [clip(each, its, 1e9, CPU) for each, its in ((plain, reference), (model, optimizer))]
                torch.testing.assert_close(*norms, rtol=1e-5, atol=1e-6, equal_nan=True)
        for each in (reference, optimizer):
            if finite:
                each.step()
            each.zero_grad()
        for module in draw.sample(list(optimizer._stages), draw.randint(0, 2)):
            model.ready(module)
    optimizer.finish()
    for parameter, wanted in pairs:
        assert torch.equal(optimizer.master(parameter), wanted) and torch.equal(parameter, wanted)
        assert (parameter in optimizer.state) == (wanted in reference.state)
        for key, value in reference.state.get(wanted, {}).items():
            assert torch.equal(optimizer.state[parameter][key], value), key
    optimizer.close()


def test_gradients_are_added_up_by_another_thread_a_few_layers_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, waiting, gate = set(), [], threading.Event()

    class Watched(cuda_link.CudaLink):
        def add(self, *arguments: Any) -> None:
            assert gate.wait(10)
            threads.add(threading.current_thread().name)
            super().add(*arguments)

    model, optimizer = lagging(monkeypatch, Watched)
    submit = optimizer._launcher.submit

    def counted(*arguments: Any) -> Any:
        waiting.append(len(optimizer._adding))
        if len(waiting) == optimizer_offload.AHEAD:
            gate.set()
        return submit(*arguments)

    monkeypatch.setattr(optimizer._launcher, "submit", counted)
    backward(model)
    assert len(waiting) == len(optimizer._stages) > optimizer_offload.AHEAD > max(waiting)
    optimizer.zero_grad()
    assert not optimizer._adding and all(name.startswith("optimizer_link") for name in threads) and threads
    optimizer.close()


@pytest.mark.parametrize("how", ["clip", "zero_grad", "step", "backward"])
def test_a_failure_to_add_up_is_raised(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Failing(cuda_link.CudaLink):
        def add(self, *arguments: Any) -> None:
            raise ZeroDivisionError("of the link")

    model, optimizer = lagging(monkeypatch, Failing)
    asked = {"clip": lambda: optimizer.clip(1.0), "zero_grad": optimizer.zero_grad, "step": optimizer.step, "backward": lambda: backward(model)}
    with pytest.raises(ZeroDivisionError, match="of the link"):
        backward(model)
        asked[how]()
    optimizer.close()


@pytest.mark.parametrize("how", ["ready", "finish", "step", "backward"])
def test_a_failure_to_launch_is_raised_where_the_weights_are_wanted(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    class Failing(cuda_link.CudaLink):
        def update(self, *arguments: Any) -> Any:
            raise ZeroDivisionError("of the link")

    model, optimizer = lagging(monkeypatch, Failing)
    step(model, optimizer)
    first = next(module for module, stage in optimizer._stages.items() if stage.on_device)
    wanted = {"ready": lambda: model.ready(first), "finish": optimizer.finish, "step": optimizer.step, "backward": lambda: backward(model)}
    with pytest.raises(ZeroDivisionError, match="of the link"):
        wanted[how]()
    optimizer.close()


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [1e9, 1.0], ids=["whole", "clipped"])
def test_steps_on_a_gpu_are_torchs(monkeypatch: pytest.MonkeyPatch, max_norm: float) -> None:
    """Given the same gradients: what the device updates to the last bit, but for clipping to a norm that was summed in parts; what the host does nearly."""
    small_parts(monkeypatch, 1 << 10)
    device = torch.device("cuda", torch.cuda.current_device())
    plain = new_model().to(device)
    reference = build_optimizer(plain, RATES)
    model, optimizer = offloaded(device)
    for _ in range(3):
        for _ in range(2):
            grads = [torch.randn_like(p) for p in plain.parameters()]
            backward(plain, grads)
            backward(model, grads)
        norms = [clip(each, its, max_norm, CPU) for each, its in ((plain, reference), (model, optimizer))]
        torch.testing.assert_close(norms[0].cpu(), norms[1].cpu(), rtol=1e-6, atol=0.0)
        for its in (reference, optimizer):
            its.step()
            its.zero_grad()
    optimizer.finish()
    torch.cuda.synchronize(device)
    for parameter, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.cpu(), optimizer.master(parameter))
        torch.testing.assert_close(parameter, wanted, rtol=1e-5, atol=1e-6)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[parameter][key], reference.state[wanted][key].cpu(), rtol=1e-5, atol=1e-6)
    if max_norm == 1e9:
        values = [p.detach().flatten().cpu() for p in plain.parameters()]
        for part in (part for stage in stages(optimizer) for part in stage.on_device):
            for piece in part.pieces:
                assert torch.equal(part.master[piece.at], values[piece.parameter][piece.of])
    optimizer.close()

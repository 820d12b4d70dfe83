"""The optimizer in host memory by itself: what it computes, in parts and on the way through a device, and what it takes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_transformer.config import ConfigError, TrainingConfig
from nsa_transformer.distributed.parallelize import build_model
from nsa_transformer.distributed.world import World
from nsa_transformer.memory import cuda_link, host, optimizer_offload
from nsa_transformer.memory.compute_dtype import use_compute_dtype
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.faults import describe_out_of_memory
from nsa_transformer.training.optimizer import build_optimizer, clip
from nsa_transformer.training.trainer import Trainer

from ..models.small import random_tokens
from ..models.small import small_config as small_model_config
from ..runs import QUIET, small_config, write_corpus
from .stand_ins import Lagging, small_parts, stand_in_for_cuda, take_workspaces

ON = "memory.optimizer_offloading.enabled=true"
# Four passes a step, and gradients that are clipped in every step.
SETTINGS = (*QUIET, "training.batch_size=4", "training.micro_batch_size=1", "training.max_grad_norm=0.5")
CPU = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


# ------------------------------------------------------------------------------------------------ the optimizer by itself


def trained(offload: bool, steps: int = 3, dtype: torch.dtype = torch.float32, max_norm: float = 0.1) -> dict[str, Tensor]:
    """Weights and moments after steps of two passes over one pack."""
    with torch.device("meta"):
        model = Transformer(small_model_config(vocab_size=61))
    if offload:
        use_compute_dtype(model, dtype)
    model.to_empty(device="cpu")
    model.init_weights(0)
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=0.01), torch.device("cpu") if offload else None)
    if isinstance(optimizer, OffloadedAdamW):
        for name, parameter in plain_model().named_parameters():
            optimizer.master(model.get_parameter(name)).copy_(parameter.detach())
        optimizer.publish()
    for step in range(steps):
        for seed in range(2):
            tokens = random_tokens(64, 2 * step + seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = model(tokens, targets=tokens.roll(-1))
            (out.loss + out.auxiliary).backward()
        clip(model, optimizer, max_norm, CPU)
        optimizer.step()
        optimizer.zero_grad()
    found = {name: optimizer_offload.master_of(optimizer, p).detach().clone() for name, p in model.named_parameters()}
    found |= {f"{key}/{name}": optimizer.state[p][key].clone() for name, p in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.close()
    return found


def plain_model() -> Transformer:
    model = Transformer(small_model_config(vocab_size=61))
    model.init_weights(0)
    return model


@pytest.mark.parametrize("chunk", [64, 256, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_updated_in_parts(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    small_parts(monkeypatch, chunk)
    # The norm of parts is not the norm of the whole to the last bit, so one that does not clip.
    plain, offloaded = (trained(offload, dtype=dtype, max_norm=1e9) for offload in (False, True))
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    plain, offloaded = (trained(offload, dtype=dtype) for offload in (False, True))
    for name in plain:
        torch.testing.assert_close(offloaded[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [64, 1 << 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_through_the_device(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    """With streams and events that have always happened: what is copied whereto, not when."""
    small_parts(monkeypatch, chunk)
    expected = {max_norm: trained(True, dtype=dtype, max_norm=max_norm) for max_norm in (1e9, 0.1)}
    stand_in_for_cuda(monkeypatch)
    locked: list[int] = []
    monkeypatch.setattr(cuda_link, "page_lock", lambda flat, owner, device, key: locked.append(len(flat)))
    monkeypatch.setattr(optimizer_offload, "link_to", cuda_link.CudaLink)
    for max_norm in expected:
        found = trained(True, dtype=dtype, max_norm=max_norm)
        assert len(locked) == 5 and len(set(locked[:4])) == 1
        locked.clear()
        assert_same(found, expected[max_norm], clipped=max_norm < 1)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], clipped: bool) -> None:
    """To the last bit, but for clipping to a norm that is summed in other parts."""
    for name in expected:
        if clipped:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("max_norm", [1e9, 0.1], ids=["whole", "clipped"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_before_it_is_there(monkeypatch: pytest.MonkeyPatch, seed: int | None, dtype: torch.dtype, max_norm: float) -> None:
    """With streams that do as little as they may, or by chance."""
    small_parts(monkeypatch, 64)
    expected = trained(True, dtype=dtype, max_norm=max_norm)
    Lagging(seed).stand_in(monkeypatch)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    monkeypatch.setattr(cuda_link, "IN_FLIGHT", 1 << 12)
    monkeypatch.setattr(optimizer_offload, "link_to", cuda_link.CudaLink)
    assert_same(trained(True, dtype=dtype, max_norm=max_norm), expected, clipped=max_norm < 1)


def test_the_backward_waits_where_too_much_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(True, max_norm=1e9)
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(cuda_link, "page_lock", lambda *_: None)
    monkeypatch.setattr(cuda_link, "IN_FLIGHT", 1)
    held: list[int] = []

    class Watched(cuda_link.CudaLink):
        def add(self, *arguments: Any) -> None:
            super().add(*arguments)
            held.append(len(self._held))

    monkeypatch.setattr(optimizer_offload, "link_to", Watched)
    found = trained(True, max_norm=1e9)
    assert set(held) == {1}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    results = []
    for offload in (None, torch.device("cpu")):
        model = plain_model()
        optimizer = build_optimizer(model, TrainingConfig(), offload)
        if isinstance(optimizer, OffloadedAdamW):
            for parameter, value in zip(model.parameters(), plain_model().parameters(), strict=True):
                optimizer.master(parameter).copy_(value.detach())
            optimizer.publish()
        (model.embedding.weight.square().sum() + model.layers[0].mlp.gate_up.weight.sum()).backward()
        norm = clip(model, optimizer, 1.0, CPU)
        optimizer.step()
        optimizer.zero_grad()
        values = [optimizer_offload.master_of(optimizer, p).detach().clone() for p in model.parameters()]
        results.append((norm, values, [name for name, p in model.named_parameters() if p in optimizer.state]))
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.close()
    (norm, values, known), (offloaded_norm, offloaded_values, offloaded_known) = results
    assert torch.equal(norm, offloaded_norm) and known == offloaded_known == ["embedding.weight", "layers.0.mlp.gate_up.weight"]
    assert all(map(torch.equal, values, offloaded_values))


def test_no_gradient_at_all_is_a_step_that_does_nothing() -> None:
    model = plain_model()
    optimizer = build_optimizer(model, TrainingConfig(), torch.device("cpu"))
    assert isinstance(optimizer, OffloadedAdamW)
    assert float(optimizer.clip(1.0)) == 0
    optimizer.step()
    optimizer.finish()
    assert not optimizer.state
    optimizer.close()


def test_the_state_of_another_optimizer_is_refused() -> None:
    optimizer = build_optimizer(plain_model(), TrainingConfig(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"host_state\(parameter\)"):
        optimizer.load_state_dict(optimizer.state_dict())


def test_the_hosts_share_has_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two begins first: a number of threads set in one reaches others that have not computed yet."""
    begin, before = optimizer_offload._begin_thread, torch.get_num_threads()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(optimizer_offload, "_begin_thread", lambda device, threads: begin(torch.device("cuda"), threads))
    optimizer = build_optimizer(plain_model(), TrainingConfig(cpu_threads=3), torch.device("cpu"))
    assert isinstance(optimizer, OffloadedAdamW)
    try:
        for thread in (optimizer._worker, optimizer._launcher):
            thread.submit(int).result()
        assert optimizer._worker.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
        optimizer.close()


# --------------------------------------------------------------------------------------------------------------- memory


def offloaded_model(work: Path, *more: str, device: str = "cpu") -> Transformer:
    return build_model(small_config(work, ON, *more), World(0, 1, torch.device(device), None))


@pytest.mark.parametrize("attention", ["nsa", "window"])
def test_what_stays_float32(work: Path, attention: str) -> None:
    more = (f"model.attention={attention}", "model.tie_embeddings=false", "training.precision=bf16")
    model = offloaded_model(work, *more)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {n for n, _ in model.named_parameters() if any(w in n for w in ("norm", "embedding", "head.", "router", "position"))}
    assert {p.dtype for p in offloaded_model(work, *more, "training.precision=fp32").parameters()} == {torch.float32}


def test_bytes_on_the_gpu_of_the_large_model(work: Path) -> None:
    """Without offload 16: weights, gradients and two moments in float32."""
    large = ("model=large", "model.vocab_size=32768", "model.hidden_size=1024", "model.num_layers=16", "model.num_heads=32", "model.num_kv_heads=2")
    large += ("model.head_dim=128", "model.intermediate_size=3584", "model.moe.num_experts=64", "model.moe.expert_size=512")
    model = offloaded_model(work, *large, "training.precision=bf16", device="meta")
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) > 1.7e9
    assert sum(p.nbytes for p in parameters) / sum(p.numel() for p in parameters) < 2.1


def test_too_little_host_memory_is_said_before_the_system_kills(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "memory_bytes", lambda: 1 << 19)
    with pytest.raises(ConfigError, match=r"memory\.optimizer_offloading\.enabled=true takes .* GiB of host memory"):
        Trainer(small_config(work, *SETTINGS, ON)).train()


def test_a_model_holds_nothing_of_an_optimizer_that_is_closed() -> None:
    """Which is 16 bytes a parameter."""
    model = plain_model()
    optimizer = build_optimizer(model, TrainingConfig(), torch.device("cpu"))
    assert isinstance(optimizer, OffloadedAdamW)
    optimizer.close()
    left = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert left() is None
    tokens = random_tokens(16, 0)
    out = model(tokens, targets=tokens)
    out.loss.backward()
    assert model.norm.weight.grad is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_gpu_without_room_is_told_of_it(work: Path, error: Exception) -> None:
    said = [describe_out_of_memory(error, "making a step", small_config(work, *more)) or "" for more in ((), (ON,))]
    assert (ON in said[0]) == isinstance(error, torch.OutOfMemoryError) and ON not in said[1]


def test_several_ranks_are_refused(work: Path) -> None:
    trainer = Trainer(small_config(work, *SETTINGS, ON))
    mesh: Any = object()
    with pytest.raises(ConfigError, match=r"built for training in one process.*memory\.optimizer_offloading\.enabled=false"):
        trainer._check_world(World(0, 1, torch.device("cpu"), mesh))


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
def test_bytes_measured_on_a_gpu(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between steps the GPU holds what passes read, rooms for a few parts, and nothing else of the optimizer."""
    small_parts(monkeypatch, 1 << 15)
    device = torch.device("cuda", torch.cuda.current_device())
    wide = ("model.hidden_size=256", "model.num_layers=4", "model.moe.num_experts=16", "model.moe.expert_size=256", "training.precision=bf16")
    config = small_config(work, ON, *wide)
    take_workspaces(device)
    before = torch.cuda.memory_allocated(device)
    model = build_model(config, World(0, 1, device, None))
    optimizer = build_optimizer(model, config.training, device)
    assert isinstance(optimizer, OffloadedAdamW)
    count = sum(p.numel() for p in model.parameters())
    for parameter in model.parameters():
        optimizer.master(parameter).normal_(std=0.02)
    optimizer.publish()
    tokens = torch.randint(0, 300, (256,), device=device)
    for _ in range(3):
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                out = model(tokens, targets=tokens.roll(-1))
            (out.loss + out.auxiliary).backward()
            del out
        assert all(p.grad is None for p in model.parameters())
        assert torch.isfinite(optimizer.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    torch.cuda.synchronize()
    for parameter in model.parameters():
        assert torch.equal(parameter.detach().cpu(), optimizer.master(parameter).to(parameter.dtype))
    held = torch.cuda.memory_allocated(device) - before
    assert held / count < 2.4, f"{held / count:.2f} bytes a parameter"
    optimizer.close()

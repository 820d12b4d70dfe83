"""Experts in host memory while training: the same run as with all of them on the device, and two layers' worth of memory there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_transformer.config import ConfigError
from nsa_transformer.distributed.parallelize import build_model
from nsa_transformer.distributed.world import World
from nsa_transformer.memory import expert_streaming, optimizer_offload
from nsa_transformer.memory.expert_streaming import StreamedExperts, host_weights
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.transformer import mixtures
from nsa_transformer.training.optimizer import build_optimizer
from nsa_transformer.training.trainer import Trainer

from ..runs import QUIET, final_files, small_config, steady_rows, write_corpus
from .stand_ins import small_parts, stand_in_for_cuda, take_workspaces

ON = "memory.expert_offloading.enabled=true"
SETTINGS = (*QUIET, "model.num_layers=5", "training.batch_size=4", "training.micro_batch_size=2", "training.max_grad_norm=0.5", "training.max_steps=4")
CPU = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


def run(folder: Path, name: str, *more: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    torch.compiler.reset()  # else what earlier runs of the process compiled decides what is compiled now, and so the last bits
    assert Trainer(small_config(folder, *SETTINGS, *more)).train() == 0
    (folder / "run").rename(folder / name)
    return steady_rows(folder / name), final_files(folder / name)


def copied_layers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on slots on the CPU stand for those of a device; the layers that are copied into them, as they are."""
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(expert_streaming, "_apart", lambda device: True)
    start, copied = expert_streaming._Stream.start, []

    def watched(self: expert_streaming._Stream, layer: int, before: Any) -> None:
        holds = list(self._holds)
        start(self, layer, before)
        if holds != self._holds:
            copied.append(layer)

    monkeypatch.setattr(expert_streaming._Stream, "start", watched)
    return copied


MODES = ["none", "selective", "full"]


@pytest.mark.parametrize("slots", [False, True], ids=["host", "slots"])
@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_the_same_bit_for_bit(work: Path, monkeypatch: pytest.MonkeyPatch, mode: str, slots: bool) -> None:
    plain = run(work, "plain", f"memory.activation_checkpointing={mode}")
    copied = copied_layers(monkeypatch) if slots else []
    assert run(work, "streamed", ON, f"memory.activation_checkpointing={mode}") == plain
    if slots:
        # Four layers of experts; each step begins with new weights, and of its two passes the first brings 0 1 2 3, then 1 0 on the way back, since 3
        # and 2 are still there; the second finds 0 and 1.
        assert copied[:10] == [0, 1, 2, 3, 1, 0, 2, 3, 1, 0]


@pytest.mark.slow
def test_a_compiled_run_is_the_same(work: Path) -> None:
    """But for rounding: the graph is cut at streamed experts, so what lies around them is fused otherwise."""
    settings = ("training.compile=true", "training.max_steps=2")
    plain, streamed = run(work, "plain", *settings)[0], run(work, "streamed", *settings, ON)[0]
    for key in ("loss", "grad_norm", "val_loss"):
        assert [row[key] for row in streamed if key in row] == pytest.approx([row[key] for row in plain if key in row], rel=1e-6), key


def test_a_run_goes_on_with_and_without(work: Path) -> None:
    whole = run(work, "whole")
    first, second = ("training.max_steps=4", "training.checkpoint_every=2", ON), ("training.max_steps=4", "training.resume=auto")
    run(work, "run2", *first)
    (work / "run2").rename(work / "run")
    for path in (work / "run" / "checkpoints").glob("step_00000004"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert run(work, "resumed", *second) == whole


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_parameters_have_shape_and_no_memory(work: Path, precision: str) -> None:
    config = small_config(work, *SETTINGS, ON, f"training.precision={precision}")
    model, plain = build_model(config, CPU), build_model(small_config(work, *SETTINGS, "memory.optimizer_offloading.enabled=true"), CPU)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    streamed = host_weights(model)
    assert set(streamed) == {p for m in mixtures(model) for p in (m.w13, m.w2)} and len(streamed) == 8
    for parameter, values in streamed.items():
        assert parameter.untyped_storage().nbytes() == parameter.element_size()
        assert (values.numel(), values.dtype) == (parameter.numel(), torch.bfloat16 if precision == "bf16" else torch.float32)
    assert not host_weights(plain)


@pytest.mark.parametrize("key", ["memory.expert_offloading.enabled", "memory.optimizer_offloading.enabled"])
def test_what_cannot_be_page_locked_is_left_off_by_its_own_key(work: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    named: list[str] = []
    link_to = optimizer_offload.link_to
    monkeypatch.setattr(optimizer_offload, "link_to", lambda *given: named.append(given[-1]) or link_to(*given))
    config = small_config(work, *SETTINGS, f"{key}=true")
    optimizer = build_optimizer(build_model(config, CPU), config.training, CPU.device)
    assert isinstance(optimizer, OffloadedAdamW) and named == [key]
    optimizer.close()


def test_the_next_layer_is_waited_for_before_it_is_brought(work: Path) -> None:
    """Its update may still be under way."""
    model = build_model(small_config(work, *SETTINGS, ON, "training.precision=fp32"), CPU)
    asked: list[int] = []
    started: list[int] = []
    blocks = list(model.layers)
    model.ready = lambda module: asked.append(blocks.index(module)) if module in blocks else None
    for mixture in mixtures(model):
        assert isinstance(mixture.experts, StreamedExperts)
        stream = mixture.experts._stream
    stream.start = lambda layer, before: (started.append(layer), asked.index(layer + 1))[0]  # type: ignore[method-assign] # the first block has no experts
    for parameter in model.parameters():
        if parameter not in host_weights(model):
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.randint(0, 300, (64,))
    out = model(tokens, targets=tokens)
    assert started == [1, 2, 3] and stream.forwards
    out.loss.backward()
    assert started == [1, 2, 3, 2, 1, 0] and not stream.forwards


def test_a_layer_is_not_copied_again_for_what_is_written_into_another(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one's update, which goes on meanwhile."""
    copied = copied_layers(monkeypatch)
    model = build_model(small_config(work, *SETTINGS, ON, "training.precision=fp32"), CPU)
    first, second = [m.experts for m in mixtures(model)][:2]
    assert isinstance(first, StreamedExperts) and isinstance(second, StreamedExperts)
    of_first, of_second = ([host_weights(model)[p] for p in (m.w13, m.w2)] for m in list(mixtures(model))[:2])
    first._stream.bring(0)
    for weight in of_second:
        weight.fill_(1.0)
    first._stream.bring(0)
    assert copied == [0]
    for weight in of_first:
        weight.fill_(2.0)
        first._stream.bring(0)
    assert copied == [0, 0, 0] and all(bool((w == 2).all()) for w in first.views())
    second._stream.bring(1)
    assert copied[3:] == [1] and all(bool((w == 1).all()) for w in second.views())


def test_a_model_without_experts_is_refused(work: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no experts; write memory\.expert_offloading\.enabled=false, and memory\.optimizer_offloading\.enabled=true"):
        Trainer(small_config(work, *SETTINGS, ON, "model.moe.num_experts=0")).train()


def test_several_ranks_are_refused(work: Path) -> None:
    mesh: Any = object()
    with pytest.raises(ConfigError, match=r"memory\.expert_offloading\.enabled=true is built for training in one process"):
        Trainer(small_config(work, *SETTINGS, ON))._check_world(World(0, 1, torch.device("cpu"), mesh))


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [("memory.activation_checkpointing=none",), ("memory.activation_checkpointing=selective",), ("training.compile=true",)])
@pytest.mark.parametrize("pin", ["true", "false"])
def test_a_run_on_a_gpu_is_the_same(work: Path, settings: tuple[str, ...], pin: str) -> None:
    """As one with the optimizer alone in host memory: the first step closely, the others nearly. Host and GPU divide the two updates otherwise, and compiled,
    each run's kernels are chosen and rounded for themselves."""
    settings = ("training.device=cuda", "training.precision=bf16", "training.max_steps=8", *settings)
    offloaded = run(work, "offloaded", "memory.optimizer_offloading.enabled=true", *settings)[0]
    streamed = run(work, "streamed", ON, f"memory.expert_offloading.pin_memory={pin}", *settings)[0]
    for key in ("loss", "val_loss", "grad_norm"):
        first, second = ([row[key] for row in rows if key in row] for rows in (offloaded, streamed))
        if key != "val_loss":
            assert second[0] == pytest.approx(first[0], rel=2e-3 if "training.compile=true" in settings else 1e-4), key
        assert second == pytest.approx(first, rel=1e-2), key


@pytest.mark.gpu
def test_bytes_measured_on_a_gpu(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_parts(monkeypatch, 1 << 15)
    device = torch.device("cuda", torch.cuda.current_device())
    wide = ("model.hidden_size=256", "model.num_layers=9", "model.moe.num_experts=16", "model.moe.expert_size=256", "training.precision=bf16")
    config = small_config(work, *SETTINGS, ON, *wide)
    take_workspaces(device)
    before = torch.cuda.memory_allocated(device)
    model = build_model(config, World(0, 1, device, None))
    optimizer = build_optimizer(model, config.training, device)
    assert isinstance(optimizer, OffloadedAdamW)
    experts = sum(w.nbytes for w in host_weights(model).values())
    rest = sum(p.nbytes for p in model.parameters() if p not in host_weights(model))
    assert torch.cuda.memory_allocated(device) - before < 1.1 * (rest + experts / 4)  # two layers of eight
    for parameter in model.parameters():
        optimizer.master(parameter).normal_(std=0.02)
    optimizer.publish()
    tokens = torch.randint(0, 300, (256,), device=device)
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(tokens, targets=tokens.roll(-1))
        (out.loss + out.auxiliary).backward()
        del out
        assert torch.isfinite(optimizer.clip(1.0))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated(device) - before < 1.2 * (rest + experts / 4)
    optimizer.close()

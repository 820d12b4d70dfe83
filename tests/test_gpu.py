"""What only a GPU can show: the same mathematics on CUDA, and a run from start to end there."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from nsa_transformer.config import Config, NSAConfig, build_config
from nsa_transformer.kernels import experts, nsa_attention

pytestmark = pytest.mark.gpu


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.detach().double().cpu() - wanted.detach().double().cpu()).norm() / wanted.detach().double().cpu().norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("geometry", [NSAConfig(8, 4, 16, 4, 1, 2, 24), NSAConfig(32, 16, 64, 16, 1, 2, 512)])
def test_attention_on_cuda_is_that_of_float64(dtype: torch.dtype, bound: float, geometry: NSAConfig) -> None:
    torch.manual_seed(0)
    lengths, heads, kv_heads, dk, dv = [1, 700, 0, 37, 1300], 8, 2, 64, 32
    total = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    shapes = [(total, heads, dk)] + [(total, kv_heads, d) for d in (dk, dv)] * 3 + [(total, heads, 3)]
    made = [torch.randn(s) for s in shapes]
    made[-1] = made[-1].sigmoid()
    exact = [x.to(dtype).double().requires_grad_() for x in made]
    there = [x.to(dtype).cuda().requires_grad_() for x in made]
    out, blocks = nsa_attention(*exact, geometry, cu_seqlens=cu, return_blocks=True)
    found = nsa_attention(*there, geometry, cu_seqlens=cu.cuda(), blocks=blocks.cuda())
    grad = torch.randn_like(out)
    out.backward(grad)
    found.backward(grad.cuda().to(dtype))
    assert relative_error(found, out) < bound
    for x, y in zip(there, exact, strict=True):
        assert relative_error(x.grad, y.grad) < bound


@pytest.mark.parametrize("collapsed", [False, True])
def test_grouped_experts_on_cuda(collapsed: bool) -> None:
    torch.manual_seed(0)
    tokens, hidden, width, count, top_k = 1003, 128, 64, 16, 4
    indices = torch.rand(tokens, count).topk(top_k).indices if not collapsed else torch.arange(top_k).expand(tokens, -1).contiguous()
    made = [torch.randn(tokens, hidden), torch.rand(tokens, top_k), torch.randn(count, 2 * width, hidden) * 0.05, torch.randn(count, hidden, width) * 0.05]
    grad = torch.randn(tokens, hidden)

    def run(device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
        x, weights, w13, w2 = (m.bfloat16().to(device, dtype).requires_grad_() for m in made)
        y = experts(x, indices.to(device), weights, w13, w2, backend=backend)
        y.backward(grad.to(device, dtype))
        return [y, x.grad, weights.grad, w13.grad, w2.grad]

    exact = run("cpu", torch.float64, "reference")
    plain = run("cuda", torch.bfloat16, "reference")
    grouped = run("cuda", torch.bfloat16, "torch")
    again = run("cuda", torch.bfloat16, "torch")
    for found, simple, wanted, second in zip(grouped, plain, exact, again, strict=True):
        assert relative_error(found, wanted) <= 2 * relative_error(simple, wanted)
        assert torch.equal(found, second)


def small_config(tmp_path: Path, **training: object) -> Config:
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(8):
        (corpus / f"{number}.txt").write_text(f"line {number} of a small text, told again and again\n" * 200)
    moe = {"num_experts": 8, "top_k": 2, "expert_size": 32}
    model = {"vocab_size": 400, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 128}
    return build_config(
        {
            "model": model | {"moe": moe, "nsa": {"compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4, "window": 32}},
            "data": {"path": str(corpus), "max_length": 256, "cache_dir": str(tmp_path / "cache")},
            "training": {"max_steps": 8, "batch_size": 4, "warmup_steps": 2, "eval_every": 0, "checkpoint_every": 4, "eval_packs": 2, **training},
            "logging": {"log_every": 1, "sample_tokens": 16},
            "run_dir": str(tmp_path / "run"),
        }
    )


@pytest.mark.parametrize("compile_blocks", [False, True])
def test_a_run_from_start_to_end(tmp_path: Path, compile_blocks: bool) -> None:
    from nsa_transformer.inference.load import load_checkpoint
    from nsa_transformer.training.trainer import Trainer

    assert Trainer(small_config(tmp_path, compile=compile_blocks)).train() == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert Trainer(small_config(tmp_path, compile=compile_blocks, resume="auto", max_steps=10)).train() == 0
    model, tokenizer = load_checkpoint(tmp_path / "run", device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor(tokenizer.encode("line 3 of a small text"), device="cuda")
    cache = model.new_cache()
    cached = torch.cat([model(ids[i : i + 1], cache=cache) for i in range(len(ids))])
    assert relative_error(cached, model(ids)) < 3e-2


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_leaves_the_gradients_alone(mode: str) -> None:
    from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
    from nsa_transformer.models.transformer import Transformer

    config = build_config({"model": {"vocab_size": 512, "num_layers": 3, "hidden_size": 128}}).model
    grads = []
    for checkpointing in ("none", mode):
        with torch.device("cuda"):
            model = Transformer(config)
        model.init_weights(0)
        apply_activation_checkpointing(model, checkpointing)
        tokens = torch.arange(900, device="cuda") % 512
        with torch.autocast("cuda", torch.bfloat16):
            out = model(tokens, targets=tokens.roll(-1))
        ((out.loss + out.auxiliary) / 900).backward()
        grads.append([p.grad for p in model.parameters()])
    for left, right in zip(*grads, strict=True):
        assert torch.equal(left, right)


def test_out_of_memory_ends_with_one_message(tmp_path: Path) -> None:
    from nsa_transformer.training.faults import OutOfMemory
    from nsa_transformer.training.trainer import Trainer

    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * 2**20) / total)
    try:
        with pytest.raises(OutOfMemory, match=r"while .*memory\.activation_checkpointing=selective"):
            Trainer(small_config(tmp_path, micro_batch_size=4)).train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

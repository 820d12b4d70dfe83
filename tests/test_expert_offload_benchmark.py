"""benchmarks/expert_offload.py without a GPU: traces that miss as often as they say, the baselines, the page."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks import expert_offload as bench
from nsa_transformer.config import ExpertOffloadingConfig
from nsa_transformer.kernels import experts
from nsa_transformer.kernels.dispatch import interpreted
from nsa_transformer.memory.expert_offload import ExpertStore, OffloadStatistics

SMALL = bench.Shape(3, 12, 16, 8, 2)


def test_shapes_have_names_that_parse():
    assert bench.parse_shape("48/128/2048/768/8") == bench.Shape(48, 128, 2048, 768, 8)
    assert bench.parse_shape(SMALL.name) == SMALL and SMALL.model_bytes == 3 * 12 * 3 * 16 * 8 * 2
    for wrong in ("48/128/2048/768", "48/4/2048/768/8", "0/128/2048/768/8", "a"):
        with pytest.raises(ValueError, match="LAYERS/EXPERTS/HIDDEN/WIDTH/TOP_K"):
            bench.parse_shape(wrong)


@pytest.mark.skipif(not interpreted(), reason="on the CPU the kernels are interpreted or not there")
def test_traces_miss_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch):
    """Counted by the store's own kernels, from the first token on."""
    from nsa_transformer.kernels.triton import expert_slots

    monkeypatch.setattr(expert_slots, "PROGRAMS", 1)
    experts_in_float32 = 3 * 5 + 2
    budget = ExpertOffloadingConfig(enabled=True, policy="lru", gpu_budget_gib=(experts_in_float32 * 2 * SMALL.expert_bytes + 3 * 104 * 4) / bench.GIB)
    store = ExpertStore(3, 12, 16, 8, 2, torch.float32, torch.device("cpu"), budget)
    store.arena.bytes.zero_()
    assert store.slots == 5
    layers = [bench.Residents(12, store.slots) for _ in range(3)]
    x, weights = torch.ones(1, 16), torch.ones(1, 2)

    def count(trace: torch.Tensor) -> tuple[int, int]:
        before = store.statistics()
        for step in trace:
            for layer, indices in enumerate(step):
                store.run(layer, x, indices[None], weights)
        after = store.statistics()
        return after.hits - before.hits, after.misses - before.misses

    filled = bench.fill(layers, 2, 0)
    assert count(filled)[1] == 3 * store.slots and all((layer.owner >= 0).all() for layer in layers)
    for seed, rate in enumerate((0.0, 0.25, 1.0)):
        trace, misses = bench.make_trace(layers, 2, rate, 6, seed)
        assert trace.shape == (6, 3, 2) and abs(misses - rate * trace.numel()) <= 3
        assert count(trace) == (trace.numel() - misses, misses)
        assert all(len(set(token)) == 2 for step in trace.tolist() for token in step)


@pytest.mark.slow
@pytest.mark.skipif(not interpreted(), reason="on the CPU the kernels are interpreted or not there")
def test_measure_and_replay_go_through(monkeypatch: pytest.MonkeyPatch):
    """All but the clock, the link and the graph: the forecast of the slots agrees with the store from the check on, or the row would fail."""
    from nsa_transformer.kernels.triton import expert_slots

    monkeypatch.setattr(expert_slots, "PROGRAMS", 1)
    monkeypatch.setattr(bench, "STEPS", 4)
    monkeypatch.setattr(bench.Stack, "link_rate", lambda self: 1e9)
    for name, answer in (("reset_peak_memory_stats", None), ("max_memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    right = bench.Stack
    monkeypatch.setattr(bench, "Stack", lambda *inputs: right(*inputs, dtype=torch.float32))
    budget = ExpertOffloadingConfig(enabled=True, policy="lru", gpu_budget_gib=(17 * 2 * SMALL.expert_bytes + 3 * 104 * 4) / bench.GIB)
    stack = bench.Stack(SMALL, budget, torch.device("cpu"))
    found = bench.measure(stack, (0.25, 1.0), prompt=10)
    assert found["status"] == "ok" and found["worst"] <= 2.0 and found["slots"] == 5
    assert [row["label"] for row in found["rows"]] == ["0%", "25%", "100%"]
    assert [row["miss_rate"] for row in found["rows"]] == pytest.approx([0.0, 0.25, 1.0], abs=0.05)
    with monkeypatch.context() as patch:
        forecast = bench.make_trace
        patch.setattr(bench, "make_trace", lambda *inputs: (forecast(*inputs)[0], 1))
        refused = bench.measure(bench.Stack(SMALL, budget, torch.device("cpu")), (0.25,), prompt=10)
        assert refused["status"].startswith("FAILED: 0 misses where the trace has 1") and refused["rows"] == []
        patch.setattr(right, "check", lambda self: float("nan"))
        assert bench.measure(stack, (0.25,), prompt=10)["status"].startswith("FAILED: error nan")
    trace = torch.stack([torch.stack([torch.randperm(12)[:2] for _ in range(3)]) for _ in range(8)])
    row = bench.replay(dataclasses.replace(SMALL, hidden=32), trace, "frequency", torch.device("cpu"))
    assert row["label"].startswith("trained router, frequency") and 0 < row["miss_rate"] < 1


def test_a_rate_that_cannot_be_is_refused():
    layer = bench.Residents(4, 3)
    layer.owner[:] = [0, 1, 2]
    with pytest.raises(ValueError, match="of 2 experts 2 cannot be missing where 3 of 4 are there"):
        layer.choose(2, 2, bench.np.random.default_rng(0))


@pytest.mark.parametrize("name", bench.BASELINES)
def test_the_baselines_compute_the_same(name: str):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, generator=generator)
    w13, w2 = torch.randn(12, 16, 16, generator=generator), torch.randn(12, 16, 8, generator=generator)
    indices, weights = torch.tensor([[7, 3]]), torch.tensor([[0.25, 0.75]])
    torch.testing.assert_close(bench.BASELINES[name](x, indices, weights, w13, w2, "cpu"), experts(x, indices, weights, w13, w2))


def results(**changes: Any) -> dict[str, Any]:
    known = dict.fromkeys(("gpu", "power_limit", "driver", "python", "torch", "triton", "cudnn", "commit", "date", "command"), "?") | {"memory_bytes": 8e10}
    shape = bench.Shape(48, 128, 2048, 768, 8)
    rows = []
    for label, misses, ms in (("0%", 0, 2.0), ("10%", 2458, 8.0)):
        rows.append(bench.make_row(label, ms, OffloadStatistics(24576 - misses, misses, 0, 0, shape.expert_bytes), 64, 50e9, 2.0))
    result = {"store": "a store", "slots": 46, "status": "ok", "rows": rows, "worst": 1.0, "link_rate": 50e9, "peak_bytes": 22e9}
    result["prefill"] = {"tokens": 4096, "ms": 1000.0, "bytes": 58e9}
    return {
        "facts": known,
        "shape": shape.name,
        "budget_gib": 20.0,
        "cap_gb": 24.0,
        "baselines": {"the chosen experts, pageable": 400.0},
        "recorded": [],
        "result": result | changes,
    }


def test_a_row_and_its_bound():
    row = results()["result"]["rows"][1]
    moved = 2458 * 3 * 2048 * 768 * 2 / 64
    assert row["bytes"] == moved and row["link_ms"] == pytest.approx(moved / 50e6) and row["miss_rate"] == pytest.approx(0.1, abs=1e-3)
    assert row["of_bound"] == pytest.approx(row["link_ms"] / 8.0) and row["of_sum"] == pytest.approx((row["link_ms"] + 2.0) / 8.0)
    assert bench.make_row("0%", 2.0, OffloadStatistics(8, 0, 0, 0, 1), 1, 50e9, 2.0)["of_bound"] == 1.0


def test_page():
    page = bench.render(results())
    assert "| 10% | 10.0% | 8.00 | 0.362 | 45.3 | 7.25 | 2.00 | 91% | 116% |" in page
    assert "22.00 GB" in page and "cap of the process 24.0 GB" in page and "58.0 GB/s of experts" in page
    assert "| the chosen experts, pageable | 400 | 200.0 / 50.0 |" in page
    assert "1.81 TB/s" in page
    failed = bench.render(results(status="FAILED: error 3.00 times that of plain PyTorch"))
    assert "**FAILED: error 3.00 times" in failed and "45.3" not in failed


def test_statistics_are_plain_numbers():
    assert dataclasses.asdict(OffloadStatistics(1, 2, 3, 4, 5)) == {"hits": 1, "misses": 2, "prefetched": 3, "streamed": 4, "expert_bytes": 5}
    assert OffloadStatistics(0, 0, 0, 7, 5).hit_rate is None and OffloadStatistics(0, 0, 0, 7, 5).copied_bytes == 35


def test_wrong_words_end_with_status_2(capsys: pytest.CaptureFixture[str]):
    for arguments, pattern in (
        (["--shape", "64/2"], "LAYERS/EXPERTS"),
        (["--miss-rates", "2"], "between 0 and 1"),
        (["--run", "x"], "--run and --text go together"),
    ):
        assert bench.main(arguments) == 2
        assert pattern in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main([]) == 2 and "needs a CUDA GPU" in capsys.readouterr().err

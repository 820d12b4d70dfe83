"""The benchmarks' own arithmetic and pages, and one tiny shape measured from start to end with a clock that is none."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend

import benchmarks.attention as attention
from benchmarks import counts, gate, page, record, recorded_selections, shapes, timing, train_step
from benchmarks.selections import make_blocks, mean_union
from nsa_transformer.config import NSAConfig, build_config
from nsa_transformer.distributed.world import World
from nsa_transformer.kernels import nsa_attention
from nsa_transformer.training import trainer
from nsa_transformer.training.console import Console

SMALL = NSAConfig(8, 4, 16, 6, 1, 2, 24)
HEADS = shapes.Heads(4, 2, 16, 24)


# ------------------------------------------------------------------------------------------------------------- shapes, counts


def test_names_of_shapes() -> None:
    for shape in shapes.DEFAULT:
        assert shapes.parse_shape(shape.name) == shape
    assert len(shapes.QUICK) == 3 and set(shapes.QUICK) <= set(shapes.DEFAULT)
    assert shapes.parse_shape("64/4/192/128@64k") == shapes.Shape(shapes.Heads(64, 4, 192, 128), 65536)
    assert [shape.name for shape in shapes.DEFAULT if not shape.backward] == ["64/4/128@128k"]
    assert shapes.parse_shape("8/2/64@1000").name == "8/2/64@1000"


@pytest.mark.parametrize("name", ["64/4/128", "64/4/128@", "64/5/128@8k", "64/0/128@8k", "64/4/128@0", "64/4@8k", "64/4/128@8x"])
def test_wrong_names_of_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"shape|tokens"):
        shapes.parse_shape(name)


@pytest.mark.parametrize("length", [1, 7, 8, 100, 300])
def test_pairs_are_those_of_brute_force(length: int) -> None:
    blocks = make_blocks("iid", length, 1, SMALL)[:, 0]
    compressed = sum(i * 4 + 8 <= t + 1 for t in range(length) for i in range(counts.num_compressed(length, SMALL)))
    window = sum(t - 24 < s <= t for t in range(length) for s in range(length))
    selected = sum(s // 16 in set(blocks[t].tolist()) for t in range(length) for s in range(t + 1))
    assert counts.count_pairs(length, SMALL) == counts.Pairs(compressed, selected, window, length * (length + 1) // 2)


def test_flops_at_64k_are_those_of_the_definition() -> None:
    shape = shapes.parse_shape("64/4/128@64k")
    flops = counts.part_flops(shape, NSAConfig())
    forward = {part: count / 1e12 for part, count in flops.items() if part not in counts.BACKWARD}
    assert forward == pytest.approx({"compressed forward": 4.39, "score + top-n": 2.20, "selected forward": 2.12, "window forward": 1.10}, rel=5e-3)
    assert sum(flops[part] for part in flops if part in counts.BACKWARD) / 1e12 == pytest.approx(19.0, rel=5e-3)
    assert [count / 1e12 for count in counts.dense_flops(shape, NSAConfig())] == pytest.approx([70.4, 175.9], rel=1e-3)


def test_kernels_find_their_parts() -> None:
    assert all(counts.part_of(name) == part for part, names in counts.PARTS.items() for name in names)
    assert counts.part_of("nsa_sum_segments") == "sums" and counts.part_of("void at::native::nsa_score") == "other"
    assert set(counts.part_bytes(shapes.parse_shape("64/4/128@8k"), NSAConfig())) < set(counts.PARTS)
    assert set(counts.BACKWARD) < set(counts.PARTS)
    parts, others = counts.by_part({"nsa_score": 1.0, "sort": 0.5, "memset": 0.75, "nsa_score_2": 2.0})
    assert parts == {"score + top-n": 3.0, "other": 1.25} and others == ["memset", "sort"]


def test_the_floor_is_the_longer_of_work_and_traffic() -> None:
    flops, moved = {"window dq": 10**12}, {"window dq": 7 * 10**9, "lists": 7 * 10**9}
    assert counts.floor_ms("window dq", flops, moved, None, 1e15) == pytest.approx(1.0)
    assert counts.floor_ms("window dq", flops, moved, None, 1e14) == pytest.approx(10.0)
    assert counts.floor_ms("lists", flops, moved, None, None) == pytest.approx(1.0)
    assert counts.floor_ms("window dq", flops, moved, 1e15, None) is None and counts.floor_ms("plan", flops, moved, 1.0, 1.0) is None


# --------------------------------------------------------------------------------------------------------------- selections


@pytest.mark.parametrize("kind", ["iid", "drift"])
@pytest.mark.parametrize("length", [1, 15, 97, 700])
def test_selections_are_legal(kind: str, length: int) -> None:
    blocks = make_blocks(kind, length, 2, SMALL, seed=length)
    assert blocks.dtype == torch.int32 and blocks.shape == (length, 2, 6)
    for t, h in itertools.product(range(length), range(2)):
        listed, own = blocks[t, h].tolist(), t // 16
        chosen = [block for block in listed if block >= 0]
        assert listed == sorted(set(chosen)) + [-1] * (6 - len(chosen))
        assert len(chosen) == min(6, own + 1) and chosen[-1] <= own
        assert {0, own, max(own - 1, 0)} <= set(chosen)


def test_neighbours_agree_as_much_as_they_should() -> None:
    config = NSAConfig()
    iid, drift = (make_blocks(kind, 8192, 1, config) for kind in ("iid", "drift"))
    late = slice(6144, 8192)
    # 125 others of which 13 are drawn: 3 + 125 * (1 - (1 - 13 / 125) ** 4), less what a change of the own block adds.
    assert mean_union(iid[late], 4) == pytest.approx(3 + 113 * (1 - (1 - 13 / 113) ** 4), abs=2)
    assert mean_union(drift[late], 4) == pytest.approx(16 + 3 * 13 * 0.1, abs=1)
    assert mean_union(iid[late], 1) == 16
    assert not torch.equal(iid, make_blocks("iid", 8192, 1, config, seed=1))
    assert torch.equal(drift, make_blocks("drift", 8192, 1, config))


# --------------------------------------------------------------------------------------------------------------------- gate


def test_the_gate_lets_the_reference_pass_and_stops_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad = gate.random_inputs(HEADS, 300, counts.num_compressed(300, SMALL), torch.bfloat16, "cpu")
    blocks = make_blocks("iid", 300, 2, SMALL)

    def verdicts() -> list[gate.Verdict]:
        return [
            gate.check_documents(HEADS, SMALL, "reference", "cpu", torch.bfloat16, (1, 70, 0, 7, 150)),
            gate.check_rows(HEADS, 300, SMALL, "reference", inputs, grad, blocks),
            gate.check_rows(HEADS, 300, SMALL, "reference", inputs, grad, None),
        ]

    for verdict in verdicts():
        assert verdict.passed and 0 < verdict.worst <= 2 and verdict.agreement == 1.0, verdict

    def off(*arguments: Any, **keywords: Any) -> Any:
        found = nsa_attention(*arguments, **keywords)
        if arguments[0].dtype == torch.float64:
            return found
        out = found[0] if isinstance(found, tuple) else found
        out = out * 1.02
        return (out, found[1]) if isinstance(found, tuple) else out

    monkeypatch.setattr(gate, "nsa_attention", off)
    for verdict in verdicts():
        assert not verdict.passed and "times that of plain PyTorch" in verdict.problem


def test_the_gate_knows_no_number_and_another_selection() -> None:
    good = tuple(torch.ones(3) for _ in range(9))
    plain = tuple(torch.full((3,), 1.01) for _ in range(9))
    assert gate.judge(good, good, plain, 1.0).passed
    assert "0.500" not in gate.judge(good, good, plain, 0.5).problem and not gate.judge(good, good, plain, 0.5).passed
    bad = (torch.tensor([1.0, float("nan"), 1.0]), *good[1:])
    assert gate.judge(bad, good, plain, 1.0).problem == "out is not finite"
    assert not gate.judge(plain, good, good, None).passed


# ------------------------------------------------------------------------------------------------------------------- timing


class Ticks:
    """A clock that says the next number."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.asked = itertools.cycle(values), [0]

    def __call__(self, call: timing.Call, repeats: int) -> list[float]:
        call()
        self.asked.append(repeats)
        return [next(self.values) for _ in range(repeats)]


def test_the_best_of_the_medians_counts_and_a_failure_stays_alone() -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nand a long story")

    found = timing.measure({"good": lambda: None, "bad": broken}, Ticks([3.0, 5.0, 4.0, 2.0]), seconds=0.006, rounds=3)
    assert found["bad"] == timing.Timing(problem="RuntimeError: no kernel") and found["bad"].ms is None
    assert found["good"].ms == min(found["good"].rounds) and len(found["good"].rounds) == 3 and found["good"].repeats == 2


# ------------------------------------------------------------------------------------------------------------ from end to end

KERNELS = {"nsa_compressed_forward": 1.0, "nsa_selected_forward": 2.0, "nsa_window_forward": 0.5, "nsa_plan": 0.01, "void at::sort<int, 2>(int)": 0.2}


def small_bench(**changes: Any) -> attention.Bench:
    bench = attention.Bench(
        "reference",
        torch.device("cpu"),
        Ticks([4.0]),
        kernels_of=lambda call: dict(KERNELS, nsa_score=0.25),
        peak_bytes=lambda call: 3 << 20,
        config=SMALL,
        dense={"cuDNN": SDPBackend.MATH, "FA2": SDPBackend.CUDNN_ATTENTION},  # the second does not exist on a CPU
        documents=(1, 70, 0, 7, 50),
    )
    return replace(bench, **changes)


@pytest.fixture
def facts() -> dict[str, Any]:
    return record.facts(["--quick"], commit="abc1234") | {"gpu": "NVIDIA H999", "memory_bytes": 90e9}


def results_of(facts: dict[str, Any], bench: attention.Bench) -> dict[str, Any]:
    return {"facts": facts, "backend": "reference", "dtype": "bfloat16", "rounds": 3, "config": vars(bench.config).copy(), "rows": []}


def test_a_tiny_run_from_start_to_end(tmp_path: Path, facts: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    bench, path = small_bench(), record.new_file(tmp_path, "attention", facts)
    assert path.name == f"attention_h999_{facts['date']}.json"
    results = results_of(facts, bench)
    tiny = [shapes.Shape(HEADS, 300), shapes.Shape(shapes.Heads(4, 2, 24, 16), 200), shapes.Shape(HEADS, 200, backward=False)]
    assert attention.run(tiny, bench, results, path) == 0, results["rows"]
    saved = json.loads(path.read_text())
    assert [row["status"] for row in saved["rows"]] == ["ok"] * 3
    row = saved["rows"][0]
    assert row["selection_ms"] == 0.25 and page.time_of(row, "iid", "forward") == 4.25 and page.time_of(row, "own", "forward") == 4.0
    assert page.speed_up(row, "drift", "cuDNN", "forward+backward") == pytest.approx(4 / 4.25)
    assert set(row["refused"]) == {"FA2, forward+backward", "FA2, forward"} and row["peak_bytes"] == {"NSA": 3 << 20, "cuDNN": 3 << 20}
    attention.write_page(path, saved)
    text = path.with_suffix(".md").read_text()
    for expected in ("NVIDIA H999", "abc1234", "--quick", "0.94 / 0.94", "4/2/24/16@200", "slower at every measured length", "score + top-n", "at::sort"):
        assert expected in text, expected
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "forward ms: iid 4.25" in capsys.readouterr().out
    assert record.new_file(tmp_path, "attention", facts).name == f"attention_h999_{facts['date']}_2.json"


def test_without_a_profiler_the_times_stand(tmp_path: Path, facts: dict[str, Any]) -> None:
    def no_profiler(call: timing.Call) -> dict[str, float]:
        raise RuntimeError("CUPTI is not there")

    for kernels_of in (no_profiler, lambda call: {}):
        bench, path = small_bench(kernels_of=kernels_of), tmp_path / "x.json"
        results = results_of(facts, bench)
        assert attention.run([shapes.Shape(HEADS, 100)], bench, results, path) == 0, results["rows"]
        assert (results["rows"][0]["selection_ms"], results["rows"][0]["selection_from"]) == (0.0, "difference")
        assert "taken as a difference of two calls" in path.with_suffix(".md").read_text()


def test_what_fails_the_gate_has_no_speed(tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "TIMES_PLAIN", 0.01)
    bench, path = small_bench(), tmp_path / "x.json"
    results = results_of(facts, bench)
    assert attention.run([shapes.Shape(HEADS, 100)], bench, results, path) == 1
    assert results["rows"][0]["status"] == "FAILED" and "times" not in results["rows"][0]
    assert "4/2/16/24@100: **FAILED**, so no speed is given" in path.with_suffix(".md").read_text()


def test_an_error_leaves_the_next_shape_its_turn(tmp_path: Path, facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LONG", 250)
    monkeypatch.setattr(attention, "LONG", 250)
    monkeypatch.setattr(page, "LONG", 250)
    full = {"4/2/16/24@100"}

    def peak(call: timing.Call) -> int:
        if full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return 5 << 30

    bench, path = small_bench(peak_bytes=peak), tmp_path / "x.json"
    results = results_of(facts, bench)
    assert attention.run([shapes.Shape(HEADS, 100), shapes.Shape(HEADS, 300)], bench, results, path) == 1
    text = path.with_suffix(".md").read_text()
    assert "4/2/16/24@100: error: OutOfMemoryError: CUDA out of memory" in text and "| 4/2/16/24@300 | forward+backward | 5.00 | 4 |" in text
    results = results_of(facts | {"memory_bytes": 24e9}, bench)
    assert attention.run([shapes.Shape(HEADS, 300)], bench, results, path) == 0
    assert results["rows"][0]["status"].startswith("skipped")


def test_break_even_in_words() -> None:
    assert page.break_even([(8192, 0.5), (16384, 2.0), (32768, 4.0)]).startswith("at about 11k tokens (0.50 × at 8k, 2.00 × at 16k")
    assert page.break_even([(16384, 2.0), (8192, 1.0)]) == "faster at every measured length, from 8k on"
    assert page.break_even([(8192, 0.9)]) == "slower at every measured length, up to 8k"
    assert page.break_even([(8192, 1.1), (16384, 0.9)]) == "slower at 16k again"
    assert page.break_even([]) == "not measured"


def test_without_a_gpu_or_with_a_wrong_shape_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, word in (([], "CUDA"), (["--shapes", "64/4@8k"], "64/4@8k"), (["--page", "nowhere.json"], "nowhere.json")):
        assert attention.main(arguments) == 2
        assert word in (said := capsys.readouterr().err) and said.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- training steps


def metrics_rows(count: int, speed: float = 100.0) -> list[dict[str, Any]]:
    return [{"step": i + 1, "tokens_per_second": speed + i, "mfu": None, "max_memory_gib": 2.0 + i, "data_wait_fraction": 0.0} for i in range(count)]


def test_the_trainer_takes_the_command(tmp_path: Path) -> None:
    words = train_step.command(65536, "nsa", "selective", tmp_path, tmp_path / "run", ["training.precision=bf16"])
    assert words[1] == "training/trainer.py"
    with initialize_config_dir(str(record.ROOT / "configs"), version_base=None):
        composed: Any = OmegaConf.to_container(compose("config", words[2:]), resolve=True)
    config = build_config(composed)
    assert (config.data.max_length, config.memory.activation_checkpointing, config.training.checkpoint_every) == (65536, "selective", 0)


def test_the_corpus_is_one_long_document(tmp_path: Path) -> None:
    train_step.write_corpus(tmp_path, size=200_000)
    files = [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*.txt"))]
    assert files == ["train/text.txt", "validation/text.txt"]
    assert len((tmp_path / "train/text.txt").read_text()) >= 200_000 and len((tmp_path / "validation/text.txt").read_text()) >= 12_500


@pytest.mark.parametrize(("kind", "backend"), [("nsa", "reference"), ("dense", None), ("window", None)])
def test_what_the_trainer_says_of_itself_is_understood(kind: str, backend: str | None) -> None:
    said = io.StringIO()
    config = build_config({"model": {"attention": kind}})
    trainer._announce(config, World(0, 1, torch.device("cpu"), None), Console(stdout=said, stderr=io.StringIO()))
    parameters, found = train_step.announced(f"something else\n{said.getvalue()}more")
    assert found == backend and parameters > 1e8
    assert train_step.announced("error: no") == (0.0, None)


TRAINER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(int(sys.argv[2])):
        row = {"step": step + 1, "tokens_per_second": 10.0, "mfu": None, "max_memory_gib": 1.0, "data_wait_fraction": 0.0}
        print(json.dumps(row), file=file, flush=True)
if sys.argv[3]:
    print("starting\\n" + sys.argv[3], file=sys.stderr)
    sys.exit(1)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("steps", "says", "problem"),
    [("9", "", ""), ("2", "error: out of memory while making a training step", "out of memory while making a training step"), ("0", "", "no step within 1")],
)
def test_a_run_ends_with_its_steps_or_its_error(tmp_path: Path, steps: str, says: str, problem: str) -> None:
    began = time.monotonic()
    arguments = [sys.executable, "-c", TRAINER, str(tmp_path / "run"), steps, says]
    ran = train_step.run_steps(arguments, tmp_path / "run", 5, patience=1.0 if steps == "0" else 20.0)
    assert len(ran.rows) == min(int(steps), 5) and ran.problem.startswith(problem) and bool(ran.problem) == bool(problem)
    assert (ran.first_step is None) == (steps == "0") and time.monotonic() - began < 20


def test_a_run_ends_with_the_time(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", TRAINER, str(tmp_path / "run"), "6", ""]
    ran = train_step.run_steps(arguments, tmp_path / "run", 8, patience=60.0, deadline=time.monotonic() + 3)
    assert ran.problem == train_step.OUT_OF_TIME and len(ran.rows) == 6
    (row,) = train_step.measure(8192, "nsa", train_step.MODES, 8, lambda mode, run_dir: ran, train_step.Memory(1e11))
    assert row["tokens_per_second"] == 10.0 and row["steps"] == 3 and row["problem"]


def test_checkpointing_is_turned_up_until_it_fits(facts: dict[str, Any]) -> None:
    tried = []

    def runner(mode: str, run_dir: Path) -> train_step.Ran:
        tried.append(mode)
        return train_step.Ran([], "out of memory while x | y") if mode == "none" else train_step.Ran(metrics_rows(8), backend="triton")

    def rows(length: int, attention: str, modes: list[str], runner: train_step.Runner) -> list[dict[str, Any]]:
        return list(train_step.measure(length, attention, modes, 8, runner, memory))

    memory, modes = train_step.Memory(100 * 2**30), list(train_step.MODES)
    sparse = rows(65536, "nsa", modes, runner)
    assert tried == ["none", "selective"] and [row["checkpointing"] for row in sparse] == tried
    assert sparse[1]["tokens_per_second"] == 105.0 and sparse[1]["peak_gib"] == 9.0 and sparse[1]["steps"] == 5
    dense = rows(65536, "dense", ["full"], lambda mode, run_dir: train_step.Ran(metrics_rows(8, 48.0)))
    broken = rows(8192, "dense", modes, lambda mode, run_dir: train_step.Ran(metrics_rows(7), "no such thing"))
    assert len(broken) == 1
    longer = rows(131072, "nsa", modes, runner)
    assert tried == ["none", "selective", "selective"] and longer[0]["problem"] == "not tried: shorter packs did not fit"
    results = {"facts": facts, "steps": 8, "corpus": "text", "settings": "model=large", "rows": [*sparse, *dense, *broken]}
    text = train_step.render(results)
    assert "| 64k | nsa | none | – | – | – | – | out of memory while x / y |" in text
    assert "| 64k | nsa (triton) | selective | 0.10 k | 1.98 | – | 9.0 |" in text and "| 8k | dense | none |" in text


def test_what_cannot_fit_is_not_tried() -> None:
    memory = train_step.Memory(140 * 2**30)

    def note(length: int, gib: float) -> None:
        memory.note(length, "nsa", "none", train_step.Ran([{"max_memory_gib": gib}], parameters=2**30))

    assert memory.expected(65536, "nsa", "none") == 0.0
    note(8192, 30.0)
    assert memory.expected(32768, "nsa", "none") == 18 + 4 * 12  # what the weights take does not grow
    note(32768, 90.0)
    assert memory.expected(65536, "nsa", "none") == 30 + 60 * 7 / 3
    assert memory.expected(65536, "nsa", "selective") == memory.expected(65536, "dense", "none") == 0.0
    (first, second) = train_step.measure(65536, "nsa", ["none", "full"], 1, lambda mode, run_dir: train_step.Ran([], "broken"), memory)
    assert first["problem"] == "not tried: by shorter packs it would take 170 GiB of 140" and second["problem"] == "broken"


def test_training_steps_need_a_gpu_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, word in (([], "CUDA"), (["--lengths", "much"], "much"), (["--steps", "3"], "--steps 3")):
        assert train_step.main(arguments) == 2
        assert word in (said := capsys.readouterr().err) and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- selections of a model


def test_what_neighbours_keep_and_share() -> None:
    """Made-up selections keep what they say, and share accordingly."""
    iid, drift = (make_blocks(kind, 2048, 2, SMALL) for kind in ("iid", "drift"))
    assert recorded_selections.kept_share(iid, SMALL) < 0.1
    assert recorded_selections.kept_share(drift, SMALL) == pytest.approx(0.9, abs=0.02)
    two, four, *_ = recorded_selections.unions(drift, SMALL)
    assert SMALL.num_selected < two < four < recorded_selections.unions(iid, SMALL)[1]


def test_blocks_of_a_model_are_those_of_its_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nsa_transformer.models.transformer import Transformer

    with initialize_config_dir(str(record.ROOT / "configs"), version_base=None):
        config = build_config(OmegaConf.to_container(compose("config", ["model=tiny", "model.num_layers=2", "model.vocab_size=300"]), resolve=True))
    model = Transformer(config.model)
    model.init_weights(0)
    tokens = torch.randint(0, 300, (400,), generator=torch.Generator().manual_seed(0))
    found = recorded_selections.record_blocks(model, tokens)
    again = recorded_selections.record_blocks(model, tokens)
    assert len(found) == 2 and all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    nsa = config.model.nsa
    for blocks in found:
        assert blocks.shape == (400, config.model.num_kv_heads, nsa.num_selected) and blocks.dtype == torch.int32
        last = blocks[-1, 0].tolist()
        assert last == sorted(set(last)) and 0 in last and 399 // nsa.select_block in last
    measured = recorded_selections.measure(model.eval(), tokens)
    text = recorded_selections.render({"facts": record.facts([], "x"), "run": "x", "model": "m", "text": "t", "lengths": [measured]})
    assert "| *drift* |" in text and "## 400 tokens" in text
    assert recorded_selections.main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err and not list(tmp_path.iterdir())

"""benchmarks/kv_quantization.py without a GPU: the task, the ways to round and their bytes, the emulation beside the cache itself, the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kv_quantization as bench
from benchmarks import needles, roundings
from benchmarks.roundings import Variant, by_block, by_channel, by_row, by_row_32, unscaled
from nsa_transformer.config import NSAConfig
from nsa_transformer.models.loss import IGNORE
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.trainer import Trainer

from .models.small import random_tokens, small_model
from .runs import QUIET, small_config, write_corpus

CPU = torch.device("cpu")
TASK = needles.Task(200, 12, 40, keys=16, values=4, filler=8)
TINY = ["--device", "cpu", "--length", "384", "--geometry", "16/8/16/6/32", "--hidden", "16", "--layers", "1", "--steps", "1", "1", "1"]
TINY += ["--batch-tokens", "384", "--sequences", "2", "--chunk", "48"]
SHIPPED, WIPED = bench.CACHES[1], bench.WIPED


# -------------------------------------------------------------------------------------------------------------------- the task


def test_every_question_has_one_pair_far_enough_away() -> None:
    drawn = needles.Source(TASK, CPU, seed=0, chains=8).draw(TASK, 5)
    for tokens, targets, answers, places in zip(drawn.tokens, drawn.targets, drawn.answers, drawn.needles, strict=True):
        pairs = tokens[places]
        assert (pairs < TASK.first_key).all() and int((tokens < TASK.first_key).sum()) == len(pairs) == TASK.pairs
        assert torch.equal(tokens[answers] - TASK.first_key, pairs // TASK.values) and tokens[answers].unique().numel() == TASK.pairs
        assert torch.equal(targets[answers], TASK.first_value + pairs % TASK.values) and torch.equal(targets[answers], tokens[answers + 1])
        assert int(places.max()) < TASK.questions - TASK.margin and int(answers[0]) == TASK.questions
        assert torch.equal(places.sort().values.view(-1, TASK.clump), places.sort().values[:: TASK.clump, None] + torch.arange(TASK.clump))
        others = targets.clone()
        others[answers] = IGNORE
        counted = others != IGNORE
        assert (others[counted] >= TASK.first_filler).all() and torch.equal(others[:-1][counted[:-1]], tokens[1:][counted[:-1]])
    assert not torch.equal(drawn.needles, drawn.needles.sort(1).values), "questions are not in the order of the pairs"


def test_filler_follows_a_source_that_no_seed_changes() -> None:
    def followers(seed: int) -> set[tuple[int, int]]:
        drawn = needles.Source(TASK, CPU, seed, chains=64).draw(TASK, 64)
        known = (drawn.targets >= TASK.first_filler) & (drawn.tokens >= TASK.first_filler)
        return set(zip(drawn.tokens[known].tolist(), drawn.targets[known].tolist(), strict=True))

    found = followers(1)
    assert found == followers(2) and len(found) == len({symbol for symbol, _ in found}) * len(needles.SUCCESSORS) > 16


def test_a_task_without_room_is_refused() -> None:
    for wrong in ({"pairs": 6}, {"pairs": 20}, {"length": 64}, {"pairs": 0}):
        with pytest.raises(ValueError, match="no multiple of clump=4 up to"):
            replace(TASK, **wrong)


def test_the_last_stage_is_the_geometry_itself() -> None:
    nsa = bench.parse_geometry("32/16/64/16/512")
    assert nsa == NSAConfig(compression="mean")
    first, second, last = needles.curriculum(nsa, 4096, (1, 2, 3))
    assert last.nsa == nsa and last.task.length == 4096 and last.task.pairs == 64 and last.task.margin == 576
    assert first.task.length <= first.nsa.num_selected * nsa.select_block < second.task.length, "all blocks selected, then not all"
    assert second.nsa.num_selected == 8, "of 32"
    for stage in (first, second):
        assert stage.nsa.window <= stage.task.margin


def test_geometries_share_parameters_and_training_lowers_the_loss() -> None:
    nsa = bench.parse_geometry("8/4/8/6/8")
    task = needles.Task(64, 4, 8, keys=4, values=4, filler=8)
    model = Transformer(needles.model_config(task, nsa, 32, 1))
    model.init_weights(0)
    other = needles.with_geometry(model, replace(nsa, window=4))
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True)) and other.config.nsa.window == 4
    rows = needles.train(model, needles.Source(task, CPU, 0, 16), [needles.Stage(task, nsa, 50), needles.Stage(task, nsa, 100)], 512, math.inf, 5e-3)
    assert [row["steps"] for row in rows] == [50, 100]
    assert rows[-1]["loss"] < 0.8 * math.log(task.vocabulary - task.first_key)
    compressed, selected, _ = model.layers[0].attention.k_proj.weight.chunk(3)
    assert torch.nn.functional.cosine_similarity(compressed.flatten(), selected.flatten(), dim=0) > 0.5, "blocks began to point as their tokens do"


def test_training_ends_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    model = Transformer(needles.model_config(TASK, bench.parse_geometry("8/4/8/6/8"), 16, 1))
    stages = [needles.Stage(TASK, model.config.nsa, 50)] * 2
    assert [row["steps"] for row in needles.train(model, needles.Source(TASK, CPU, 0, 8), stages, 200, 0.0, 1e-3)] == [1, 1]
    assert capsys.readouterr().out.count("step 1:") == 2


# ------------------------------------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("way", [by_row, by_row_32, by_channel, by_block, unscaled])
def test_what_is_read_back_is_near(way: Callable[..., torch.Tensor]) -> None:
    x = torch.randn(64, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = way(x, 16)
    assert y.dtype == x.dtype and y.shape == x.shape
    assert 0.015 < float((y.float() - x.float()).norm() / x.float().norm()) < 0.035, "three bits behind the leading one"
    assert torch.equal(way(torch.zeros_like(x), 16), torch.zeros_like(x))


def test_who_shares_a_scale() -> None:
    x = torch.randn(32, 2, 8, generator=torch.Generator().manual_seed(1))
    changed = {"row": (3, 0), "channel": (slice(0, 16), 0, 5), "block": (slice(0, 16), 0)}
    for way, own in ((by_row, "row"), (by_channel, "channel"), (by_block, "block")):
        y = x.clone()
        y[3, 0, 5] = 1000.3  # a new largest number
        differ = torch.zeros_like(x, dtype=torch.bool)
        differ[changed[own]] = True
        a, b = way(x, 16), way(y, 16)
        assert torch.equal(a[~differ], b[~differ]) and not torch.equal(a[differ], b[differ])
        assert float(b[3, 0, 5]) == pytest.approx(1000.3, rel=2**-8 if own == "row" else 1e-6), "the largest is kept, as well as its scale is"
    assert float(unscaled(torch.full((1, 1, 1), 1000.0), 1)) == 448 == -float(unscaled(torch.full((1, 1, 1), -1000.0), 1))


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0, 5, 24])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_emulated_is_what_the_cache_does(threshold: int, chunk: int) -> None:
    model, tokens = small_model(), random_tokens(60)
    cache, emulated = (Variant("", by_row, by_row, threshold, shipped) for shipped in (True, False))
    found = bench.through(model, tokens, cache, chunk)
    assert torch.equal(found, bench.through(model, tokens, emulated, chunk))
    plain = bench.through(model, tokens, bench.CACHES[0], chunk)
    torch.testing.assert_close(plain, model(tokens), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, plain)
    for way in (by_channel, roundings.forgotten):
        assert not torch.equal(found, bench.through(model, tokens, replace(emulated, keys=way), chunk))


@torch.no_grad()
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_outliers_change_the_keys_and_nothing_else(compression: str) -> None:
    model, tokens = small_model(nsa={"compression": compression}), random_tokens(90)
    other = roundings.with_outliers(model, 16.0, (1,))
    assert torch.equal(model(tokens), other(tokens))
    (_, before), (_, after) = (roundings.queries_and_keys(each, tokens)[1] for each in (model, other))
    assert torch.equal((after / before).flatten(0, 1), torch.tensor([1.0, 16.0, 1.0, 1.0] * 2).expand(180, -1))
    quantized = Variant("", by_row, by_row, 0)
    assert not torch.equal(bench.through(model, tokens, quantized, 9), bench.through(other, tokens, quantized, 9))
    channels = Variant("", by_channel, by_row, 0)
    assert torch.equal(bench.through(model, tokens, channels, 9), bench.through(other, tokens, channels, 9))


def test_errors_of_keys() -> None:
    q, k = torch.randn(200, 4, 32, generator=torch.Generator().manual_seed(2)), torch.randn(130, 2, 32, generator=torch.Generator().manual_seed(3))
    assert roundings.key_error(q, k, lambda x, size: x, 64) == {"keys": 0.0, "nats": 0.0, "scores": 0.0}
    found = roundings.key_error(q, k, lambda x, size: x * 1.01, 64)
    assert found["keys"] == pytest.approx(0.01, rel=1e-3) and found["scores"] == pytest.approx(0.01, rel=0.05)
    assert found["nats"] == pytest.approx(0.01, rel=0.1), "scores of normal numbers have a spread of about one nat"
    with pytest.raises(ValueError, match="kind='odd'"):
        roundings.synthetic("odd")
    assert roundings.synthetic("shifted")[1][..., 0].float().mean() == pytest.approx(16, rel=0.01)


# -------------------------------------------------------------------------------------------------------------------- memory


def test_bytes_of_a_row() -> None:
    paper = NSAConfig()
    rows = {name: Variant(name, way, by_row).row_bytes(128, paper) for name, way in (("row", by_row), ("channel", by_channel), ("none", unscaled))}
    assert rows == {"row": 256 + 4 + 32, "channel": 256 + 8 + 2 + 32, "none": 256 + 2 + 32}
    assert Variant("", by_row_32, by_row_32).row_bytes(128, paper) == 256 + 8 + 32
    assert bench.CACHES[0].row_bytes(128, paper) == 544 and Variant("", by_block, by_block).row_bytes(64, paper) == 128 + 16 + 1 / 8
    assert roundings.tokens_ratio(SHIPPED, None, 128, paper) == pytest.approx(544 / 292)
    assert "| 128 | a row (the cache) | 512 | 292.0 | 1.60 | 1.82 | 1.86 |" in bench._memory(paper)
    assert roundings.tokens_ratio(SHIPPED, 8192, 128, paper) < roundings.tokens_ratio(SHIPPED, 65536, 128, paper) < 544 / 292


@torch.no_grad()
@pytest.mark.parametrize("variant", [bench.CACHES[0], replace(SHIPPED, threshold=24)], ids=lambda variant: variant.name)
def test_bytes_are_those_of_the_cache(variant: Variant) -> None:
    model = small_model().bfloat16()
    cache, config = variant.cache(model), model.config.nsa
    pages = 2
    tokens = pages * cache.span
    model(random_tokens(tokens) % 61, cache=cache)
    held = 0.0
    for store in cache.layers[0].stores:
        held += store.nbytes if len(store) == 1 else store.nbytes / len(store) * pages
    assert held / model.config.num_kv_heads == variant.sequence_bytes(tokens, model.config.head_dim, config)


# ---------------------------------------------------------------------------------------------------------------------- the page


def test_what_is_said_of_a_cache() -> None:
    targets = torch.tensor([[5, IGNORE, 7, 8], [5, 6, IGNORE, 8]])
    data = needles.Sequences(torch.zeros_like(targets), targets, torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 15], [8, 15]]))
    plain = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])
    right = torch.tensor([[5, 0, 7, 0], [0, 6, 0, 9]])
    first = bench.describe(data, plain, right, None)
    assert first["loss"] == 1.0 and first["found"] == 0.75 and first["others"] == 0 and first["asked"] == 4 and "change" not in first
    assert first["by_depth"][0] == 1.0 and first["by_depth"][4] == 1.0 and first["by_depth"][7] == 0.5
    worse = plain.clone()
    worse[0] *= 1.02
    second = bench.describe(data, worse, torch.tensor([[5, 1, 7, 1], [1, 6, 1, 8]]), (plain, right))
    assert second["change"] == pytest.approx(0.01, rel=1e-4) and second["change_error"] == pytest.approx(0.01, rel=1e-4)
    assert second["others"] == 1 and second["found"] == 1.0 and second["answers"] == pytest.approx(1.01, rel=1e-4)


def test_pointed_counts_selected_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    data = needles.Source(TASK, CPU, 0, 8).draw(TASK, 3)
    blocks = torch.full((TASK.length, 2, 4), -1, dtype=torch.int32)
    model = Transformer(needles.model_config(TASK, bench.parse_geometry("8/4/8/6/8"), 16, 1))
    monkeypatch.setattr(bench, "record_blocks", lambda model, tokens: [blocks, blocks - 1])
    assert bench.pointed(model, data) == 0
    blocks[data.answers[0], 1, 3] = (data.needles[0] // 8).int()
    expected = sum(int((data.needles[b] // 8 == data.needles[0] // 8).sum()) + int((data.needles[b] // 8 == data.needles[0] // 8 - 1).sum()) for b in range(3))
    assert bench.pointed(model, data) == pytest.approx(expected / data.needles.numel())


def numbers(folder: Path) -> tuple[dict[str, Any], str]:
    (page,) = folder.glob("*.md")
    return json.loads(page.with_suffix(".json").read_text()), page.read_text()


def test_a_page_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--out", str(tmp_path), "--commit", "abc"]) == 0
    found, page = numbers(tmp_path)
    assert [row["scale"] for row in found["rows"]] == [variant.name for variant in bench.CACHES] and len(found["outliers"]) == len(bench.WITH_OUTLIERS)
    assert len(found["all"]) == len(bench.WITH_ALL) and 0 < found["pointed"] < 1 and "## The same model with all blocks selected" in page
    assert found["outliers"][0]["loss"] == found["rows"][0]["loss"] and [row["steps"] for row in found["training"]] == [1, 1, 1]
    assert "| a row (the cache) | 512 |" in page and "| old blocks wiped | 512 |" in page and "Commit abc" in page and "geometry 16/8/16/6/32" in page
    assert "| synthetic, shifted | a block |" in page
    assert "found" in capsys.readouterr().out


def test_the_time_limit_leaves_what_was_measured(tmp_path: Path) -> None:
    assert bench.main([*TINY, "--time-limit", "0", "--out", str(tmp_path)]) == 1
    found, page = numbers(tmp_path)
    assert all(row["problem"] == bench.LATE for row in found["rows"] + found["outliers"] + found["all"]) and bench.LATE in page


def test_a_cache_that_fails_leaves_the_others_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[bench.Row] = []

    def read(model: Transformer, data: needles.Sequences, variant: Variant, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
        if variant is SHIPPED:
            raise RuntimeError("no | such kernel")
        return torch.ones(2, TASK.length), torch.zeros(2, TASK.length, dtype=torch.int64)

    monkeypatch.setattr(bench, "read", read)
    bench.measure(small_model(), needles.Source(TASK, CPU, 0, 8).draw(TASK, 2), (bench.CACHES[0], SHIPPED, WIPED), 8, math.inf, rows.append)
    assert [bool(row["problem"]) for row in rows] == [False, True, False] and "no / such kernel" in bench._quality(rows)


def test_a_run_is_read_without_needles(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    assert Trainer(small_config(tmp_path, *QUIET, "training.max_steps=2", "training.eval_every=0")).train() == 0
    arguments = ["--run", str(tmp_path / "run"), "--device", "cpu", "--length", "64", "--sequences", "2", "--chunk", "16", "--out", str(tmp_path / "out")]
    assert bench.main(arguments) == 0
    found, page = numbers(tmp_path / "out")
    assert found["training"] == [] and "found" not in found["rows"][0] and found["rows"][1]["change"] == 0.0, "nothing is old within the threshold"
    assert found["rows"][3]["change"] != 0.0 and "## Found" not in page and "## Training" not in page


def test_wrong_words_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["--geometry", "32/16"], "five numbers"),
        (["--length", "x"], "no number of tokens"),
        (["--length", "48"], "no multiple of clump"),
        (["--sequences", "0"], "at least 1"),
        (["--run", str(tmp_path / "nothing")], "nothing"),
    ):
        assert bench.main([*TINY, *words, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main([]) == 2 and "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

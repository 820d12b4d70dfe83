"""benchmarks/experts.py without a GPU: shapes, the check before timing, the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import experts as bench

SMALL = bench.Shape(32, 16, 6, 2, 40)


def test_shapes_have_names_that_parse():
    assert bench.parse_shape("2048/768/128/8@32768") == bench.Shape(2048, 768, 128, 8, 32768)
    assert all(bench.parse_shape(name).name == name for name in bench.DEFAULT)
    for wrong in ("2048/768/128@32768", "2048/768/4/8@64", "0/768/128/8@64", "a"):
        with pytest.raises(ValueError, match="HIDDEN/WIDTH/EXPERTS/TOP_K@TOKENS"):
            bench.parse_shape(wrong)


def test_plain_is_the_same_function():
    case = bench.random_inputs(SMALL, "skewed", torch.float32, "cpu")
    for a, b in zip(bench.answer(bench.plain, case), bench.answer(bench.experts, case), strict=True):
        torch.testing.assert_close(a, b)


def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch):
    assert bench.check(SMALL, "balanced", "torch", torch.float32, "cpu")[0]
    right = bench.experts
    monkeypatch.setattr(bench, "experts", lambda *inputs, backend: right(*inputs, backend=backend) * (1.0 if backend == "reference" else 1.001))
    passed, worst, _ = bench.check(SMALL, "balanced", "torch", torch.float32, "cpu")
    assert not passed and worst > 2
    monkeypatch.setattr(bench, "experts", lambda *inputs, backend: right(*inputs, backend=backend) * (1.0 if backend == "reference" else torch.nan))
    assert not bench.check(SMALL, "balanced", "torch", torch.float32, "cpu")[0]


def test_page():
    names = ("triton", "torch", "plain", "plain, compiled")
    times: dict[str, Any] = {f"{name}|{what}": {"ms": 2.0, "problem": ""} for name in names for what in ("forward", "forward+backward")}
    times["plain, compiled|forward"] = {"ms": None, "problem": "it failed"}
    row = {"shape": SMALL.name, "routing": "balanced", "flops": 1e12, "status": "ok", "check": {"worst": 0.9, "of": "x"}, "load_max_over_mean": 1.25}
    rows = [row | {"times": times, "saved_bytes": {"triton": 1 << 30, "torch": 1 << 31}, "kernels": {"experts_up": 1.5}}, row | {"status": "FAILED"}]
    known = dict.fromkeys(("gpu", "power_limit", "driver", "python", "torch", "triton", "cudnn", "commit", "date", "command"), "?") | {"memory_bytes": 8e10}
    page = bench.render({"facts": known, "rows": rows})
    assert "| 2.00 | 2.00 | 2.00 | – | 500 | 1.00 / – |" in page and "| 1500 | 1.00 / 1.00 |" in page
    assert "FAILED" in page and "| 1.25 | 0.90 (x) | 1.00 | 2.00 | – |" in page and "`experts_up`" in page


def test_wrong_words_end_with_status_2(capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--shapes", "64@64"]) == 2
    assert "HIDDEN/WIDTH/EXPERTS/TOP_K@TOKENS" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main([]) == 2 and "needs a CUDA GPU" in capsys.readouterr().err

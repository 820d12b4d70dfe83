"""benchmarks/decode.py without a GPU: sizes, the check before timing, the page."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import decode as bench
from benchmarks.shapes import Heads
from nsa_transformer.config import NSAConfig

SMALL, HEADS = NSAConfig(8, 4, 16, 5, 1, 2, 50), Heads(4, 2, 64, 64)


def test_sizes_have_names_that_parse() -> None:
    assert bench.parse_size("16x64k") == bench.Size(16, 65536)
    assert all(bench.parse_size(name).name == name for name in bench.DEFAULT)
    for wrong in ("64k", "0x8k", "ax8k", "4x"):
        with pytest.raises(ValueError, match=r"write one such as"):
            bench.parse_size(wrong)


def test_bytes_of_a_step() -> None:
    # The paper's geometry: 4,095 compressed keys, 512 of the window and 1,024 chosen ones, for 4 heads of 128 in bf16.
    assert bench.bytes_read(bench.Size(2, 65536), Heads(64, 4, 128, 128), NSAConfig(), 2) == 2 * 4 * (4095 + 512 + 1024) * 256 * 2
    assert bench.bytes_read(bench.Size(1, 5), Heads(64, 4, 128, 128), NSAConfig(), 2) == 4 * 10 * 256 * 2


def test_what_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = (HEADS, SMALL, [300, 7], torch.float32, "cpu", "reference")
    assert bench.check(*arguments)[0]
    right: Any = bench.nsa_decode
    for spoilt in (lambda out, blocks: (out * 1.001, blocks), lambda out, blocks: (out * torch.nan, blocks), lambda out, blocks: (out, blocks.roll(1, -1))):
        monkeypatch.setattr(bench, "nsa_decode", lambda *a, spoilt=spoilt, **k: spoilt(*right(*a, **k)))
        assert not bench.check(*arguments)[0]


def test_a_quantized_cache_is_one_that_can_be_read() -> None:
    cache = bench.quantized(bench.random_cache([700, 40], HEADS, SMALL, torch.float32, "cpu"), SMALL)
    out = bench.nsa_decode(*bench.queries(2, HEADS, torch.float32, "cpu"), cache, SMALL, backend="reference")
    assert isinstance(out, torch.Tensor) and out.isfinite().all() and out.shape == (2, 4, 64)


def test_page() -> None:
    times = {"sparse": 0.05, "sparse, FP8": None, "Triton": 0.06, "Triton, FP8": 0.07, "cuDNN": 0.4, "FA2": 0.5}
    row = {"size": "16x64k", "status": "ok", "bytes": 75_000_000, "check": "error 0.90 of plain", "times": times, "kernels": {"decode_scan": 0.03, "fill": 1.0}}
    small = row | {"size": "1x8k", "times": {name: ms for name, ms in times.items() if "Triton" not in name}}
    known = dict.fromkeys(("gpu", "power_limit", "driver", "python", "torch", "triton", "cudnn", "commit", "date", "command"), "?") | {"memory_bytes": 8e10}
    page = bench.render({"facts": known, "heads": "64/4/128", "copy_rate": 3e12, "rows": [row, small, {"size": "1x64k", "status": "FAILED: a|b"}]})
    assert "| 16x64k | 50.0 | – | 60.0, 70.0 | 400.0 | 500.0 | 8.00 | 50% | error 0.90 of plain |" in page
    assert "| 1x8k | 50.0 | – | the same | 400.0 | 500.0 | 8.00 | 50% | error 0.90 of plain |" in page
    assert "FAILED: a/b" in page and "`decode_scan` 30.0" in page and "fill" not in page


def test_wrong_words_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--sizes", "64k"]) == 2 and "BATCHxTOKENS" in capsys.readouterr().err
    assert bench.main(["--heads", "5/2/64"]) == 2 and "must divide" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main([]) == 2 and "needs a CUDA GPU" in capsys.readouterr().err

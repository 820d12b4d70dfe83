from __future__ import annotations

import io
import re
from typing import Any

import pytest

from nsa_transformer.training.console import Console, format_count, format_duration

ROW = {
    "step": 10,
    "tokens": 1000,
    "loss": 3.25,
    "lr": 6e-4,
    "grad_norm": 1.5,
    "tokens_per_second": 12345.0,
    "mfu": None,
    "max_memory_gib": 3.2,
    "data_wait_fraction": 0.012,
}
VAL = {"step": 10, "val_loss": 3.0, "val_bpb": 1.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(stdout=out, stderr=err)
    console.info("before")
    with console.live(20):
        for step in range(1, 11):
            console.advance(step, 2.0)
        console.update(ROW)
        console.update(VAL)
        console.warning("careful")
    console.info("[after]")
    assert out.getvalue().splitlines() == [
        "before",
        "step 10/20 | loss 3.2500 | lr 6.00e-04 | grad norm 1.50 | tokens/s 12.3k | memory 3.20 GiB | data wait 1.2% | 20 s left",
        "step 10/20 | val loss 3.0000 | val bpb 1.5000",
        "[after]",
    ]
    assert err.getvalue() == "warning: careful\n"


def test_other_ranks_are_silent() -> None:
    out = Terminal()
    console = Console(enabled=False, stdout=out, stderr=out)
    with console.live(2):
        console.advance(1, 1.0)
        console.update(ROW)
        console.info("x")
        console.warning("x")
    assert out.getvalue() == ""


def test_time_left_is_the_median_of_the_latest_steps() -> None:
    console = Console(enabled=False)
    with console.live(1000, first_step=100):
        assert console.seconds_left() is None
        console.advance(101, 500.0)  # compiles
        for step in range(102, 106):
            console.advance(step, 2.0)
        assert console.seconds_left() == pytest.approx(2.0 * 895)
        for step in range(106, 206):
            console.advance(step, 4.0)
        assert console.seconds_left() == pytest.approx(4.0 * 795)


@pytest.mark.parametrize("width", [1, 5, 12, 30, 80, 200])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_panel_fits_any_width_and_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch, width: int, error: Any) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setenv("TERM", "xterm-256color")
    out = Terminal()
    console = Console(stdout=out, stderr=io.StringIO())
    try:
        with console.live(20):
            console.advance(10, 1.0)
            console.update(ROW | {"mfu": 0.413, "expert_load_max_over_mean": 1.2})
            console.update(VAL)
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert error is KeyboardInterrupt
    text = out.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text[text.rindex("\x1b[2K") :])
    lines = last.replace("\r", "").splitlines()
    assert max(len(line) for line in lines) <= width
    if width >= 80:
        assert "step 10/20" in lines[0]
        assert "10 s left" in lines[0]
        assert "MFU 41.3%" in last
        assert "val bpb 1.5000" in last
    before = len(out.getvalue())
    console.info("after [x]")
    assert out.getvalue()[before:] == "after [x]\n"


def test_warnings_reach_a_redirected_stderr_while_the_panel_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), io.StringIO()
    console = Console(stdout=out, stderr=err)
    with console.live(2):
        console.warning("to the file")
        console.info("on the [screen]")
    assert err.getvalue() == "warning: to the file\n"
    assert "to the file" not in out.getvalue()
    assert "on the [screen]" in out.getvalue()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Console(stdout=out).live(20):
        pass
    console = Console(stdout=out)
    with console.live(20):
        console.update(ROW)
    assert out.getvalue().startswith("step 10/20 | loss 3.2500")
    assert "\x1b" not in out.getvalue()


def test_units() -> None:
    assert [format_count(x) for x in (0, 7.4, 999.4, 999.6, 12345, 999_600, 1.2e6, 4.56e9)] == ["0", "7", "999", "1.00k", "12.3k", "1.00M", "1.20M", "4.56G"]
    assert [format_duration(x) for x in (-1, 42.4, 59.6, 423, 7500, 100_000)] == ["0 s", "42 s", "1 min 00 s", "7 min 03 s", "2 h 05 min", "1 d 03 h"]

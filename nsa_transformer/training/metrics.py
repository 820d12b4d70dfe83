"""Numbers of a run: `metrics.jsonl`, mirrored to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import netrc
import os
import secrets
import sys
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nsa_transformer.config import LoggingConfig, WandbConfig
from nsa_transformer.utils.files import write_atomic

__all__ = ["MetricsWriter", "read_metrics", "truncate_metrics"]

BRANCHES = ("compressed", "selected", "window")
INIT_SECONDS = 30.0  # wandb's patience at the start and at the end of a run
FINISH_SECONDS = 60.0


def _clean(value: Any) -> Any:
    """`value` as JSON can hold it: scalars of numpy and torch become Python's, arrays lists, NaN and infinities null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry) for entry in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    """One row, or None for what is not a whole row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`, in order. A last line that a killed process left unfinished is not a row.

    Raises `ValueError` naming the line where any other line is damaged.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif line.strip() and number < len(lines):
            raise ValueError(f"{path}: line {number} is not a row of metrics; delete that line")
    return rows


def truncate_metrics(path: str | os.PathLike[str], step: int) -> int:
    """Remove, atomically, the rows whose `step` is above `step` and every damaged line; returns how many lines went.

    A row belongs to the step it names: what an interrupted run wrote after its last checkpoint will be written again.
    """
    path = Path(path)
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines = [line for line in content.split(b"\n") if line.strip()]
    kept = []
    for line in lines:
        row = _parse(line)
        if row is not None and row["step"] <= step:
            kept.append(line + b"\n")
    if b"".join(kept) != content:
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row under names that group in a dashboard: `train/…`, `val/…`, `gates/…`, `experts/…`, `val_experts/…`."""
    group = "val" if "val_loss" in row else "train"
    found: dict[str, float] = {}
    for key, value in row.items():
        if key == "gate_means" and value is not None:
            for layer, means in enumerate(value):
                found |= {f"gates/layer_{layer:02d}_{branch}": mean for branch, mean in zip(BRANCHES, means, strict=True) if mean is not None}
        elif key == "expert_balance" and value is not None:
            for what, layers in value.items():
                found |= {f"experts/moe_layer_{layer:02d}_{what}": number for layer, number in enumerate(layers) if number is not None}
        elif key == "expert_load" and value is not None and group == "val":
            for layer, load in enumerate(value):
                if None not in load and sum(load) > 0:
                    found[f"val_experts/moe_layer_{layer:02d}_max_over_mean"] = max(load) * len(load) / sum(load)
        elif key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{group}/{key.removeprefix('val_')}"] = value
    return found


class MetricsWriter:
    """Appends rows to `run_dir/metrics.jsonl` and mirrors their numbers.

    `resume_step` is the step of the checkpoint the run continues from, 0 for a fresh start: later rows are removed first.
    Write a step's rows before its checkpoint, so that a checkpoint never knows more than the metrics.
    `warn` shows one line to a person; by default it goes to stderr.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config: LoggingConfig,
        full_config: Mapping[str, Any],
        resume_step: int,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        warn = warn or _warn_on_stderr
        self.path = run_dir / "metrics.jsonl"
        truncate_metrics(self.path, resume_step)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self._tensorboard: Any = None
        self._wandb: _Wandb | None = None
        try:
            if config.tensorboard:
                self._tensorboard = _tensorboard_writer(run_dir / "tensorboard", resume_step, warn)
            if config.wandb.project is not None:
                self._wandb = _Wandb(run_dir, config.wandb, full_config, warn)
        except BaseException:
            self.close()
            raise

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. It needs an int `step`; NaN and infinities are written as null."""
        clean = _clean(row)
        if not isinstance(clean.get("step"), int):
            raise ValueError(f"a row of metrics needs its step as an int, not step={clean.get('step')!r}")
        self._file.write(json.dumps(clean, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is None and self._wandb is None:
            return
        numbers = scalars(clean)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, clean["step"])
        if self._wandb is not None:
            self._wandb.log({"step": clean["step"], **numbers})

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _warn_on_stderr(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _tensorboard_writer(folder: Path, resume_step: int, warn: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warn("TensorBoard is not installed, so no tensorboard/ is written: pip install tensorboard, or write logging.tensorboard=false")
        return None
    # TensorBoard hides what an earlier process wrote at purge_step and later.
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if folder.exists() else None, flush_secs=30)


class _Wandb:
    """A Weights & Biases run that can fail at any moment without the training noticing: one warning, then nothing more."""

    def __init__(self, run_dir: Path, config: WandbConfig, full_config: Mapping[str, Any], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._run: Any = None
        try:
            import wandb
        except ImportError:
            warn("wandb is not installed, so nothing goes to Weights & Biases: pip install wandb, or leave logging.wandb.project out")
            return
        try:
            self._start(wandb, run_dir, config, full_config)
        except Exception as error:  # whatever a service or its client may raise
            self._fail(error)

    def _start(self, wandb: Any, run_dir: Path, config: WandbConfig, full_config: Mapping[str, Any]) -> None:
        (run_dir / "wandb").mkdir(exist_ok=True)
        id_file = run_dir / "wandb" / "run_id"
        resumed = id_file.exists()
        run_id = id_file.read_text(encoding="utf-8").strip() if resumed else secrets.token_hex(4)
        if not resumed:
            write_atomic(id_file, run_id + "\n")

        def init(mode: str) -> Any:
            # With the network gone in the middle of a run the upload must not hold the end of it; what is left stays on the disk.
            settings = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True, console="off", silent=True)
            return wandb.init(
                project=config.project,
                entity=config.entity,
                dir=str(run_dir),
                id=run_id,
                resume="allow" if mode == "online" else None,
                name=run_dir.resolve().name,
                config=dict(full_config),
                mode=mode,
                settings=settings,
            )

        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_login(wandb.setup().settings) else "offline")
        try:
            self._run = init(mode)
        except Exception as error:
            if mode != "online":
                raise
            self._warn(f"Weights & Biases cannot be reached ({_first_line(error)}); the run is recorded offline, `wandb sync` in {run_dir} uploads it")
            wandb.teardown()
            self._run = init("offline")
        # Rows name their own step: after a resume they begin before the last one that was sent, which wandb's own counter would drop.
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log(numbers)
            except Exception as error:
                self._fail(error)

    def finish(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            try:
                run.finish()
            except Exception as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._run = None
        self._warn(f"Weights & Biases failed and is left out from here on ({_first_line(error)}); the training goes on, metrics.jsonl is complete")


def _has_wandb_login(settings: Any) -> bool:
    """Whether wandb will find credentials by itself; without this check it would ask at the keyboard."""
    if settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(settings.base_url).hostname
    paths = [os.environ["NETRC"]] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return any(host is not None and Path(path).is_file() and netrc.netrc(path).authenticators(host) is not None for path in paths)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]

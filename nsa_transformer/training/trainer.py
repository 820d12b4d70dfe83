"""The training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import Config, ConfigError, to_dict, unsupported_options
from nsa_transformer.data.loader import TextData, merge_packs, open_data, packs_of_step
from nsa_transformer.data.pack import IGNORE, Pack
from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.distributed.checkpoint import CONFIG, checkpoint_path, load_checkpoint_into, load_weights, resolve_weights, save_checkpoint, write_config
from nsa_transformer.distributed.expert_parallel import check_expert_parallel
from nsa_transformer.distributed.parallelize import build_model, draw_weights
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.kernels.dispatch import choose_backend
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.moe import load_statistics
from nsa_transformer.models.transformer import LossOutput, Transformer, count_parameters
from nsa_transformer.training.balance import StepLoad
from nsa_transformer.training.console import Console
from nsa_transformer.training.evaluate import Evaluation, evaluate
from nsa_transformer.training.faults import OutOfMemory, Stopped, StopSignal, TrainingError, describe_lost_rank, describe_out_of_memory
from nsa_transformer.training.meter import Meter
from nsa_transformer.training.metrics import MetricsWriter
from nsa_transformer.training.optimizer import build_optimizer, clip, learning_rate
from nsa_transformer.training.profiling import Profiler
from nsa_transformer.training.report import write_report
from nsa_transformer.training.resume import find_start
from nsa_transformer.utils.files import remove_leftovers, write_atomic
from nsa_transformer.utils.hardware import device_name

MAX_BAD_STEPS = 5  # updates in a row that may be skipped for a loss or gradient that is not finite


@dataclass
class Progress:
    """What a checkpoint knows beside weights and moments."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # target tokens seen
    next_pack: int = 0  # global index of the next pack
    bad_steps: int = 0  # updates skipped in a row


class Trainer:
    """`Trainer(config).train()`: one run, from whatever checkpoint `config.training.resume` finds, to its last step.

    Raises `ConfigError` before any work for settings that cannot run, `TrainingError` where training cannot go on.
    """

    def __init__(self, config: Config) -> None:
        unsupported = unsupported_options(config)
        if unsupported:
            raise ConfigError("\n".join(unsupported))
        self.config = config
        self.console = Console(enabled=int(os.environ.get("RANK", "0")) == 0)
        self.doing = "starting"  # for messages about memory and files
        self.began = False  # before the first step a problem is one of the settings
        self.evaluation: Evaluation | None = None  # the newest
        self._loaded: tuple[int, list[Pack], Pack] | None = None  # of the step that begins with this pack: its packs, and the first pass's on the device
        self.saved: Path | None = None  # the newest checkpoint, saved or continued

    def train(self) -> int:
        """Run to the end. Returns 0, or 128 + the signal that stopped it after saving: 143 for SIGTERM, 130 for Ctrl-C."""
        try:
            with StopSignal() as stop, open_world(self.config.training.device) as world:
                return self._train(world, stop)
        except Stopped as stopped:
            self.console.info(f"stopped by a signal while {self.doing}")
            return 128 + stopped.signal
        except OSError as error:  # a full disk, a folder that vanished
            where = f"{error.filename}: " if error.filename else ""
            problem = f"{where}{error.strerror or error}, while {self.doing}"
            if not self.began:
                raise ConfigError(problem) from error
            raise TrainingError(f"{problem}; when that is mended, continue with run_dir={self.run_dir} training.resume=auto") from error
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            message = describe_out_of_memory(error, self.doing, self.config)
            if message is not None:
                raise OutOfMemory(message) from error
            lost = describe_lost_rank(error, self.doing)
            if lost is None:
                raise
            how = f"continue with run_dir={self.run_dir} training.resume=auto" if self.saved is not None else "start it again"
            raise TrainingError(f"{lost}. When that is mended, {how}") from error

    # ------------------------------------------------------------------------------------------------------------ the run

    def _train(self, world: World, stop: StopSignal) -> int:
        self._check_world(world)
        self._prepare_run_dir(world)
        self._set_up(world)
        config, progress = self.config.training, self.progress
        full_config = to_dict(self.config)
        self.began = True
        with (
            self._metrics(full_config) as metrics,
            Profiler(self.run_dir, self.config.logging.profiling, world.device, self.console.info) as profiler,
            self.console.live(config.max_steps, progress.step),
            stop.deferred(),
            self._host_threads(),
        ):
            meter = Meter(self.config, world, self.optimizer.waited if isinstance(self.optimizer, OffloadedAdamW) else None)
            stopped = 0  # the signal that some rank received, as all ranks know it
            while progress.step < config.max_steps and not stopped:
                passes = self._passes(world, meter, stop)
                if passes is None:
                    stopped = world.largest(stop.received)
                    if self.saved != checkpoint_path(self.run_dir, progress.step).resolve():
                        self._save()
                    break
                row = self._update(*passes, world, meter)
                profiler.step()
                self.console.advance(progress.step, meter.last_step_seconds)
                last = progress.step == config.max_steps
                if row is not None and (progress.step % self.config.logging.log_every == 0 or last):
                    self._write(metrics, row | meter.read())
                if last or _due(progress.step, config.eval_every):
                    self.evaluation = self._evaluate()
                    self._write(metrics, self.evaluation.row(progress.step))
                stopped = world.largest(stop.received)
                if last or stopped or _due(progress.step, config.checkpoint_every):
                    self._save()
                meter.restart()
        if stopped:
            self.console.info(f"stopped by a signal after saving step {progress.step}; continue with run_dir={self.run_dir} training.resume=auto")
            return 128 + stopped
        self.doing = "writing the report"
        if self.evaluation is None:  # resumed at its very end
            self.evaluation = self._evaluate()
        write_report(self.config, self.run_dir, self.model, self.data, self.validation, self.evaluation, progress.next_pack, world, self.console)
        return 0

    def _passes(self, world: World, meter: Meter, stop: StopSignal) -> tuple[Tensor, Tensor, int] | None:
        """Gradients of one optimizer step over `batch_size` packs, with the summed loss, the expert loads of all ranks and the number of targets.

        None where a signal came between two passes: a long step is given up, and made whole after the resume.
        """
        config = self.config.training
        self.doing = "making a training step"
        packs, first = self._packs_of_step(world, meter)
        # Every token of the step weighs the same, whatever pack, pass or rank it is in.
        num_targets = max(int(world.sum(torch.stack([(p.targets != IGNORE).sum() for p in packs]).sum())), 1)
        loss, load = torch.zeros((), device=world.device), StepLoad(self.config.model.moe.global_loss_weight, world)
        for start in range(0, len(packs), config.micro_batch_size):
            if start and world.largest(stop.received):
                self.optimizer.zero_grad(set_to_none=True)
                return None
            pack = merge_packs(packs[start : start + config.micro_batch_size])
            meter.count(pack)
            pack = pack.to(world.device) if start else first
            with self._autocast():
                out = self.model(pack.tokens, pack.cu_seqlens, targets=pack.targets, valid=pack.valid, loss_chunk_size=config.loss_chunk_size)
            assert isinstance(out, LossOutput)
            # FSDP2 averages gradients over ranks where a sum is wanted.
            (load.add(out) * (world.size / num_targets)).backward()
            loss += out.loss.detach()
        if self.progress.step + 1 < config.max_steps:
            self._load(self.progress.next_pack + config.batch_size, world, meter)
        return loss, load.total(), num_targets

    def _update(self, loss: Tensor, load: Tensor, num_targets: int, world: World, meter: Meter) -> dict[str, Any] | None:
        """Clip, check, step; a row of metrics, or None where the update was skipped."""
        config, progress = self.config.training, self.progress
        rate = learning_rate(progress.step + 1, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = world.sum(loss) / num_targets
        grad_norm = clip(self.model, self.optimizer, config.max_grad_norm, world)

        # Read before the update: what crosses the link beside that of an offloaded optimizer waits for its end.
        values = {"loss": loss.item(), "lr": rate, "grad_norm": grad_norm.item()}
        statistics = load_statistics(load) if load.numel() else {}
        if self.config.model.moe.forced_balance:
            statistics["forced_balance"] = True  # else the rows and plots of a benchmark would look like those of a well-balanced router
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        if finite:
            self.optimizer.step()
            self.model.update_router_bias(load)
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += num_targets
        progress.next_pack += config.batch_size
        meter.step_done()
        if not finite:
            self._skip(values["loss"], values["grad_norm"])
            return None
        progress.bad_steps = 0
        return {"step": progress.step, "tokens": progress.tokens, **values, **statistics}

    def _skip(self, loss: float, grad_norm: float) -> None:
        self.progress.bad_steps += 1
        what = f"step {self.progress.step}: loss {loss:g}, gradient norm {grad_norm:g}"
        if self.progress.bad_steps >= MAX_BAD_STEPS:
            raise TrainingError(
                f"{what}; {MAX_BAD_STEPS} updates in a row were not finite and none was made. Lower training.learning_rate or "
                "lengthen training.warmup_steps, and continue from the newest checkpoint with training.resume=auto; docs/troubleshooting.md has more"
            )
        self.console.warning(f"{what}; this update was skipped")

    def _packs_of_step(self, world: World, meter: Meter) -> tuple[list[Pack], Pack]:
        """The packs of this rank, and those of the first pass on the device."""
        if self._loaded is None or self._loaded[0] != self.progress.next_pack:
            self._load(self.progress.next_pack, world, meter)
        assert self._loaded is not None
        _, packs, first = self._loaded
        self._loaded = None
        return packs, first

    def _load(self, next_pack: int, world: World, meter: Meter) -> None:
        """The packs of a step, while the passes of the one before are computed. The first ones have to be on the device before an offloaded optimizer fills
        the link: a copy after that came when the whole update was over."""
        config = self.config.training
        numbers = packs_of_step(next_pack, config.batch_size, config.micro_batch_size, world.rank, world.size)
        with meter.loading():
            packs = [self.data.train.pack(number) for number in numbers]
            self._loaded = next_pack, packs, merge_packs(packs[: config.micro_batch_size]).to(world.device)

    def _evaluate(self) -> Evaluation:
        self.doing = "validating"
        lengths = self.data.tokenizer.byte_lengths
        return evaluate(self.model, self.validation, lengths, self.world, self._autocast(), self.config.training.loss_chunk_size)

    def _write(self, metrics: MetricsWriter | None, row: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(row)
        self.console.update(row)

    def _save(self) -> None:
        self.doing = "saving a checkpoint"
        train = self.data.train
        state = vars(self.progress) | {"data_fingerprint": self.data.fingerprint, "stream_fingerprint": train.fingerprint}
        state["stream_position"] = train.position(self.progress.next_pack)
        path = save_checkpoint(
            self.run_dir, self.progress.step, self.model, self.optimizer, state, self.texts, self.world, self.config.training.keep_checkpoints
        )
        self.saved = path.resolve()
        self.console.info(f"saved {path}")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.training.precision == "bf16")

    # ------------------------------------------------------------------------------------------------------------- set-up

    def _check_world(self, world: World) -> None:
        self.world = world
        config = self.config.training
        self._check_offloading(world)
        if config.batch_size % (config.micro_batch_size * world.size):
            unit = config.micro_batch_size * world.size
            raise ConfigError(
                f"training.batch_size={config.batch_size} must be a multiple of training.micro_batch_size={config.micro_batch_size} times {world.size} ranks; "
                f"write training.batch_size={unit * max(1, round(config.batch_size / unit))}"
            )
        check_expert_parallel(config.expert_parallel_size, world)

    def _check_offloading(self, world: World) -> None:
        memory = self.config.memory
        for key, enabled in (("expert_offloading", memory.expert_offloading.enabled), ("optimizer_offloading", memory.optimizer_offloading.enabled)):
            if enabled and world.mesh is not None:
                raise ConfigError(
                    f"memory.{key}.enabled=true is built for training in one process, and torchrun started this one; start it without torchrun, or write "
                    f"memory.{key}.enabled=false: FSDP2 shares weights and moments among the ranks"
                )
        if memory.expert_offloading.enabled and not self.config.model.has_experts:
            raise ConfigError(
                "memory.expert_offloading.enabled=true, and the model has no experts; write memory.expert_offloading.enabled=false, "
                "and memory.optimizer_offloading.enabled=true for its optimizer"
            )

    def _prepare_run_dir(self, world: World) -> None:
        name = self.config.run_dir or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
        self.run_dir = Path(world.broadcast_text(name) or name)
        self.named = bool(self.config.run_dir)
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise ConfigError(f"run_dir={self.run_dir} is a file; name a folder")
        self.start = find_start(self.config, self.run_dir, self.console.warning)
        world.barrier()  # nobody writes before all have looked

    def _set_up(self, world: World) -> None:
        config = self.config
        _announce(config, world, self.console)
        torch.manual_seed(config.training.seed + world.rank)
        if world.device.type == "cpu" and config.training.cpu_threads is not None:
            torch.set_num_threads(config.training.cpu_threads)
        self.doing = "reading the data"
        with world.main_first():
            self.data: TextData = open_data(config.data, config.model.vocab_size, config.training.seed, self.console.info)
        self.validation = self.data.validation_packs(config.training.eval_packs)
        self.doing = "building the model"
        self.model: Transformer = build_model(config, world)
        self.doing = "building the optimizer"
        offloads = config.memory.offloads_optimizer
        self.optimizer = build_optimizer(self.model, config.training, world.device if offloads else None)
        if isinstance(self.optimizer, OffloadedAdamW):
            self.console.info(self.optimizer.describe())
        self.progress = Progress()
        self.doing = "loading weights"
        if self.start is not None:
            self._restore(self.start)
        elif config.training.init_from is not None:
            source = resolve_weights(config.training.init_from, "training.init_from")
            self._check_tokenizer(source)
            load_weights(source, self.model, self.optimizer)
            self.console.info(f"weights of {source}")
        else:
            draw_weights(self.model, config.model, config.training.seed, world.device, self.optimizer)
        self.config = config = replace(config, run_dir=str(self.run_dir))
        self.texts = {CONFIG: write_config(config), "tokenizer.json": self.data.tokenizer.to_json()}
        with world.main_first():
            if world.is_main:
                self._write_run_dir()

    def _check_tokenizer(self, source: Path) -> None:
        """Weights mean the tokens they were trained on; of other ones the shapes alone would tell nothing."""
        if (source / "tokenizer.json").exists() and Tokenizer.load(source).fingerprint != self.data.tokenizer.fingerprint:
            raise ConfigError(f"training.init_from={source} was trained with another tokenizer than this run has; write data.tokenizer={source}")

    def _write_run_dir(self) -> None:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=self.named)
            for name, text in self.texts.items():
                write_atomic(self.run_dir / name, text)
            if (self.run_dir / "checkpoints").is_dir():
                remove_leftovers(self.run_dir / "checkpoints")
        except FileExistsError:
            raise ConfigError(f"another run began in the same second, in {self.run_dir}; start this one again, or name its folder with run_dir=") from None
        except OSError as error:
            raise ConfigError(f"run_dir={self.run_dir} cannot be written ({error.strerror}); name another folder") from None

    def _restore(self, path: Path) -> None:
        state = load_checkpoint_into(path, self.model, self.optimizer, self.world)
        if state.pop("stream_fingerprint") != self.data.train.fingerprint or state.pop("data_fingerprint") != self.data.fingerprint:
            raise ConfigError(
                f"the data is not what {path} was trained on (data.path, its files, or the tokenizer changed); restore it, "
                f"or start a new run with training.init_from={path} data.tokenizer={path}"
            )
        position = state.pop("stream_position", None)  # older checkpoints have none, and their epochs are planned anew
        if position is not None:
            self.data.train.start_at(position)
        self.progress = Progress(**state)
        if self.progress.step > self.config.training.max_steps:
            raise ConfigError(f"training.max_steps={self.config.training.max_steps} lies before step {self.progress.step} of {path}; write a larger one")
        self.saved = path.resolve()
        self.console.info(f"continuing {path} at step {self.progress.step}")

    @contextmanager
    def _metrics(self, full_config: dict[str, Any]) -> Iterator[MetricsWriter | None]:
        if not self.world.is_main:
            yield None
            return
        with MetricsWriter(self.run_dir, self.config.logging, full_config, self.progress.step, self.console.warning) as writer:
            yield writer

    @contextmanager
    def _host_threads(self) -> Iterator[None]:
        """However the run ends, an offloaded optimizer's thread ends with it."""
        try:
            yield
        finally:
            if isinstance(self.optimizer, OffloadedAdamW):
                self.optimizer.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _announce(config: Config, world: World, console: Console) -> None:
    total, active = count_parameters(config.model)
    ranks = f" × {world.size} ranks" if world.size > 1 else ""
    size = f"{total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active for a token"
    console.info(f"{size}; {config.model.attention} attention{_backend(config, world.device)}; {device_name(world.device)}{ranks}")
    moe, layers = config.model.moe, config.model.num_layers
    if moe.num_experts and not config.model.has_experts:
        console.warning(
            f"no layer has experts: model.moe.num_dense_layers={moe.num_dense_layers} is all of model.num_layers={layers}, and model.moe counts for nothing; "
            f"write model.moe.num_dense_layers={layers - 1} or fewer, or model.moe.num_experts=0 if that is meant"
        )
    if config.model.has_experts and moe.top_k == 1 < moe.num_experts and not moe.forced_balance:
        console.warning(
            "model.moe.top_k=1: the weight of a token's only expert is renormalised to 1 whatever the router says, so the loss teaches the router nothing; "
            "write model.moe.top_k=2 or more"
        )
    if moe.forced_balance:
        console.warning("model.moe.forced_balance=true: experts take turns whatever the router says; for benchmarks alone, the model learns no routing")
    if world.device.type == "cpu":
        tokens = config.training.max_steps * config.training.batch_size * config.data.max_length
        hours = tokens * 6 * active / (world.size * CPU_FLOPS) / 3600
        if hours > 1:
            console.warning(f"no GPU: at a typical {CPU_FLOPS / 1e9:.0f} GFLOP/s this run takes about {hours:,.0f} hours; model=tiny takes minutes")


def _backend(config: Config, device: torch.device) -> str:
    """` (triton)` or ` (reference)`: what sparse attention will run on."""
    model = config.model
    if model.attention != "nsa":
        return ""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    q, v = (torch.empty(0, model.num_heads, width, dtype=dtype, device=device) for width in (model.head_dim, model.value_dim))
    return f" ({choose_backend('auto', q, v, model.nsa)})"


CPU_FLOPS = 50e9  # what two cores reach on these matrices; only for the warning above

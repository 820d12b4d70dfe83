"""What a run is and where it stands."""

from __future__ import annotations

from pathlib import Path

from nsa_transformer.config import ConfigError
from nsa_transformer.distributed.checkpoint import CONFIG, find_damage, list_checkpoints, read_config
from nsa_transformer.models.transformer import count_parameters
from nsa_transformer.training.metrics import read_metrics


def describe_run(run_dir: Path) -> str:
    """Model, last metrics and checkpoints, a line each. Raises `ConfigError` for a folder that is no run."""
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} is no run: it has no {CONFIG}")
    config = read_config(run_dir)
    total, active = count_parameters(config.model)
    model, training = config.model, config.training
    lines = [
        f"model       {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {model.num_layers} layers, {model.attention} attention"
        + (", model.moe.forced_balance: routing not learned" if model.moe.forced_balance else ""),
        f"data        {config.data.path or 'source of the Python standard library'}, packs of {config.data.max_length} tokens",
    ]
    metrics = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    for kind, key in (("training", "loss"), ("validation", "val_loss")):
        last = next((row for row in reversed(rows) if row.get(key) is not None), None)
        if last is not None:
            bpb = f", {last['val_bpb']:.4f} bits per byte" if "val_bpb" in last else ""
            lines.append(f"{kind:<11} step {last['step']} of {training.max_steps}: loss {last[key]:.4f}{bpb}")
    for path in list_checkpoints(run_dir):
        lines.append(f"checkpoint  {path} {'verified' if (damage := find_damage(path)) is None else f'DAMAGED: {damage}'}")
    return "\n".join(lines)

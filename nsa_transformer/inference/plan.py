"""What generating with a configuration takes in memory."""

from __future__ import annotations

import torch

from nsa_transformer.config import Config, ConfigError
from nsa_transformer.inference.load import on_meta
from nsa_transformer.memory.expert_offload import FREE_SHARE, NO_EXPERTS, check_budget, least_bytes, most_bytes
from nsa_transformer.models.cache_size import cache_size
from nsa_transformer.models.transformer import count_parameters, mixtures
from nsa_transformer.utils.hardware import GIB


def describe_plan(config: Config, dtype: torch.dtype, length: int, batch: int, memory: tuple[float, str] | None) -> str:
    """Parameters, weights, cache of `batch` sequences of `length` tokens, and whether they fit `memory` (bytes, what it is; None: not said), a line each.

    Raises `ConfigError` where experts are to be offloaded and there are none, or their budget does not hold those of a token.
    """
    model = on_meta(config, dtype)
    total, active = count_parameters(config.model)
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    size = cache_size(config.model, config.memory.kv_cache, dtype)
    least, most = size.total([length], batch), size.total([length], batch, grown=True)
    where, held, lack = "", float(weights), ""
    offloading = config.memory.expert_offloading
    if offloading.enabled:
        layers = list(mixtures(model))
        if not layers:
            raise ConfigError(NO_EXPERTS)
        each, count = layers[0].w13[0].nbytes + layers[0].w2[0].nbytes, config.model.moe.num_experts
        experts = len(layers) * count * each
        held -= experts
        room_for = f"{FREE_SHARE:.0%} of what is free"
        if memory is not None or offloading.gpu_budget_gib is not None:
            free = 0.0 if memory is None else max(memory[0] - held, 0)
            needed = least_bytes(len(layers), count, each, config.model.moe.top_k)
            if offloading.gpu_budget_gib is None:
                budget = FREE_SHARE * free
                if budget < needed:
                    lack = f", the experts of a token and two to stream take {needed / GIB:.2f} GiB, more than {room_for}"
            else:
                budget = offloading.gpu_budget_gib * GIB
                check_budget(int(budget), len(layers), count, each, config.model.moe.top_k)
                if memory is not None and budget > free:
                    lack = f", memory.expert_offloading.gpu_budget_gib={offloading.gpu_budget_gib:g} is more than the {free / GIB:.2f} GiB that are free"
            slots = min(budget, most_bytes(len(layers), count, each))
            held += slots
            room_for = f"{slots / GIB:.2f} GiB"
        where = f", {experts / GIB:.2f} of them experts in host memory, with slots of {room_for} on the GPU"
    name = str(dtype).removeprefix("torch.")
    grown = "" if most == least else f", up to {most / GIB:.2f} as it grows token by token"
    lines = [
        f"model    {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active; {config.model.num_layers} layers, {config.model.attention} attention",
        f"weights  {weights / GIB:.2f} GiB in {name}{where}",
        f"cache    {size.describe()}",
        f"         {batch} x {length:,} tokens: {least / GIB:.2f} GiB at once{grown}",
    ]
    if memory is not None:
        room, of = memory
        verdict = "fits" if held + most <= room else "fits if the cache is filled at once" if held + least <= room else "does not fit"
        if lack:
            verdict = f"does not fit{lack}"
        upto = "" if most == least else f" to {(held + most) / GIB:.2f}"
        lines.append(f"memory   {(held + least) / GIB:.2f}{upto} of the {room / GIB:.1f} GiB of {of}: {verdict}")
    lines.append("         for generating; activations come on top, and what training takes is not counted")
    return "\n".join(lines)

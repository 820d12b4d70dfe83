"""What may go wrong while a model generates, and how it is said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nsa_transformer.models.cache import KVCache
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.faults import is_out_of_memory
from nsa_transformer.utils.hardware import GIB


class OutOfMemory(ValueError, RuntimeError):
    """More was to be generated than there is memory for; the message says what to ask for instead. A `ValueError` for who asked for it, and a `RuntimeError`
    like torch's own, for who knows nothing of it. The cache is good for nothing any more: some layers may have the last tokens and others not."""


@contextmanager
def memory_explained(model: Transformer, cache: KVCache) -> Iterator[None]:
    """Errors about memory inside become `OutOfMemory`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_describe(error, model, cache)) from None


def _describe(error: BaseException, model: Transformer, cache: KVCache) -> str:
    helps = []
    if cache.config.attention == "nsa" and not cache.quantized:
        helps.append("memory.kv_cache.quantization=fp8 (--kv-cache fp8)")
    if len(cache.lengths) > 1:
        helps.append("fewer prompts at once")
    helps.append("fewer new tokens (--max-new-tokens) or a shorter prompt")
    if model.embedding.weight.dtype == torch.float32:
        helps.append("weights and cache in bfloat16 (--dtype bfloat16)")
    sequences = f" in {len(cache.lengths)} sequences" if len(cache.lengths) > 1 else ""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"out of memory as the cache grew to {sum(cache.lengths):,} tokens{sequences}; so far it takes {cache.nbytes / GIB:.3f} GiB. "
        f"Try {', '.join(helps)}. ({first_line})"
    )

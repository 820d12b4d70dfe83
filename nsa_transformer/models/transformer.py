"""The decoder-only transformer: pre-norm blocks of attention and experts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_transformer.config import KVCacheConfig, ModelConfig
from nsa_transformer.models.attention import DenseAttention, NativeSparseAttention
from nsa_transformer.models.cache import KVCache, LayerView
from nsa_transformer.models.layout import PackLayout
from nsa_transformer.models.loss import IGNORE, summed_loss, token_losses
from nsa_transformer.models.moe import MLP, MixtureOfExperts, RouterStatistics
from nsa_transformer.models.rope import RotaryEmbedding


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
            # torch computes this in float32 and rounds once: on the CPU the same bits as below, on a GPU one kernel. Under autocast it may stay float32.
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@dataclass(frozen=True)
class LossOutput:
    """What a pass over a pack gives to training.

    loss       float32, the summed negative log-likelihood in nats of all targets, or one value per token `[T]`
    auxiliary  float32 scalar, router losses of this pass alone, summed over real tokens
    load       int64 [MoE layers, E], visits of real tokens to experts
    share      float32 [MoE layers, E] for `global_balance_loss`, which needs the load of other passes and ranks too; None where it has no weight
    """

    loss: Tensor
    auxiliary: Tensor
    load: Tensor
    share: Tensor | None


BlockOutput = tuple[Tensor, RouterStatistics | None]


class Block(nn.Module):
    """norm → attention → norm → experts or MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention: NativeSparseAttention | DenseAttention
        if config.attention == "nsa":
            self.attention = NativeSparseAttention(
                config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.nsa, config.head_dim_v, rope=rope
            )
        else:
            self.attention = DenseAttention(config, rope, config.nsa.window if config.attention == "window" else None)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        has_experts = config.layer_has_experts(index)
        self.mlp = MixtureOfExperts(config.hidden_size, config.moe) if has_experts else MLP(config.hidden_size, config.intermediate_size)
        # How the block is run: activation checkpointing puts itself in here.
        self.run: Callable[..., BlockOutput] = _run

    def forward(self, x: Tensor, layout: PackLayout, valid: Tensor | None = None, cache: LayerView | None = None) -> BlockOutput:
        return self.run(self._forward, x, layout, valid, cache)

    def _forward(self, x: Tensor, layout: PackLayout, valid: Tensor | None, cache: LayerView | None) -> BlockOutput:
        x = x + self.attention(self.attention_norm(x), layout=layout, cache=cache)
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            # Nobody asks for those of a step of decoding, which is many small kernels as it is.
            y, statistics = self.mlp(normed, layout.document, len(layout.cu_seqlens) - 1, valid, count=cache is None or cache.plan is not None)
            return x + y, statistics
        return x + self.mlp(normed), None


class Transformer(nn.Module):
    """A language model over packed documents. `init_weights(seed)` draws the weights; nothing here knows of ranks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.rope = RotaryEmbedding(config.head_dim, config.rope_theta, config.max_position_embeddings, config.original_max_position_embeddings)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, self.rope) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Called with the embedding, each block, and the last norm (for the output projection too) before a pass reads its weights: whoever still
        # writes them lets the pass wait.
        self.ready: Callable[[nn.Module], None] = _always_ready

    def forward(
        self,
        tokens: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        valid: Tensor | None = None,
        cache: KVCache | None = None,
        sequence: int | None = 0,
        loss_chunk_size: int = 2048,
        per_token: bool = False,
        last_only: bool = False,
    ) -> Tensor | LossOutput:
        """Logits `[T, vocab]`, or, with targets, their loss.

        Args:
            tokens: int64 `[T]`, documents packed by cu_seqlens (int32 `[num_docs + 1]`; None: one document).
            targets: int64 `[T]`, -100 where there is no loss.
            valid: bool `[T]`, False for padding, which expert loads and router losses leave out.
            cache: continue its sequence number `sequence`; keys and values so far are attended, the new ones appended. None is for `decode`.
            loss_chunk_size: tokens whose logits exist at once.
            per_token: return a loss per token, without gradient, instead of the differentiable sum.
            last_only: logits of the last token alone, `[1, vocab]`.

        Raises:
            ValueError: an argument of a wrong shape, dtype or (on the CPU) value, or a sequence past `max_position_embeddings`.
        """
        self._check(tokens, cu_seqlens, targets, valid, cache, loss_chunk_size)
        plan = None
        if cache is None:
            layout = PackLayout.build(len(tokens), cu_seqlens, self.config.nsa, self.rope, tokens.device)
        elif sequence is None:
            layout = PackLayout.step(cache.count_step(), self.rope)
        else:
            plan = cache.extend(sequence, len(tokens), tokens.device)
            layout = PackLayout.chunk(plan, self.rope, tokens.device)
        self._check_lengths(layout.cu_seqlens)
        self.ready(self.embedding)
        x = self.embedding(tokens)
        statistics = []
        for index, block in enumerate(self.layers):
            self.ready(block)
            x, found = block(x, layout, valid, None if cache is None else LayerView(cache.layers[index], plan))
            if found is not None:
                statistics.append(found)
        self.ready(self.norm)
        x = self.norm(x[-1:] if last_only else x)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if targets is None:
            return F.linear(x, weight).float() if torch.is_autocast_enabled(x.device.type) else F.linear(x, weight)
        loss = token_losses(x, weight, targets, loss_chunk_size) if per_token else summed_loss(x, weight, targets, loss_chunk_size)
        auxiliary = torch.stack([s.auxiliary for s in statistics]).sum() if statistics else x.new_zeros((), dtype=torch.float32)
        num_experts = self.config.moe.num_experts
        load = torch.stack([s.load for s in statistics]) if statistics else torch.zeros(0, num_experts, dtype=torch.int64, device=x.device)
        shares = [s.share for s in statistics if s.share is not None]
        return LossOutput(loss, auxiliary, load, torch.stack(shares) if shares else None)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One token more of each sequence of a cache: tokens int64 `[B]`, logits `[B, vocab]`. A sequence without tokens stays so, and its logits mean nothing.

        Fixed shapes, and nothing waits for the device. Raises `ValueError` where a sequence would outgrow the model's positions.
        """
        if tokens.dim() != 1 or tokens.dtype != torch.int64 or len(tokens) != len(cache.lengths):
            raise ValueError(f"tokens is {tokens.dtype} {list(tokens.shape)}; give torch.int64 [{len(cache.lengths)}], a token of each sequence of the cache")
        self._check_ids(tokens)  # before the cache counts a token
        cache.reserve_step(tokens.device)
        return self.decode_reserved(tokens, cache)

    @torch.no_grad()
    def decode_reserved(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """`decode` after `cache.reserve_step`: the part that can be recorded and replayed as a CUDA graph. A call of the module, since a sharded one is whole
        in its own forward alone."""
        return self(tokens, cache=cache, sequence=None)

    def new_cache(self, num_sequences: int = 1, settings: KVCacheConfig | None = None) -> KVCache:
        """An empty cache; `settings` as in `memory.kv_cache`, None: all in the compute dtype."""
        return KVCache(self.config, num_sequences, settings)

    def update_router_bias(self, load: Tensor) -> None:
        """Balance the experts: load `[MoE layers, E]` of a whole optimizer step over all ranks."""
        mixtures = [block.mlp for block in self.layers if isinstance(block.mlp, MixtureOfExperts)]
        for mixture, row in zip(mixtures, load, strict=True):
            mixture.router.update_bias(row)

    def init_weights(self, seed: int) -> None:
        """Draw all weights and reset all buffers, each parameter from a generator of its own, so that the order does not matter."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(initial_value(name, parameter.shape, self.config, seed, parameter.device))
            for buffer in self.buffers():
                buffer.zero_()

    def _check(
        self, tokens: Tensor, cu_seqlens: Tensor | None, targets: Tensor | None, valid: Tensor | None, cache: KVCache | None, loss_chunk_size: int
    ) -> None:
        for name, given, dtype in (("tokens", tokens, torch.int64), ("targets", targets, torch.int64), ("valid", valid, torch.bool)):
            if given is None:
                continue
            if given.dim() != 1 or given.dtype != dtype or len(given) != len(tokens) or given.device != tokens.device:
                size = "T" if name == "tokens" else len(tokens)
                raise ValueError(
                    f"{name} is {given.dtype} {list(given.shape)} on {given.device}; "
                    f"give {dtype} [{size}] on {tokens.device}, packed documents without a batch axis"
                )
        if cache is not None and cu_seqlens is not None:
            raise ValueError("cu_seqlens and cache exclude each other: a cache holds one sequence")
        if loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size={loss_chunk_size} must be at least 1")
        self._check_ids(tokens)
        if tokens.device.type != "cpu":
            return
        last = self.config.vocab_size - 1
        if targets is not None and bool(((targets != IGNORE) & ((targets < 0) | (targets > last))).any()):
            raise ValueError(f"targets holds ids from {int(targets.min())} to {int(targets.max())}; write 0 … {last}, or {IGNORE} where there is no loss")

    def _check_ids(self, tokens: Tensor) -> None:
        last = self.config.vocab_size - 1
        if tokens.device.type == "cpu" and len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) > last):
            raise ValueError(f"tokens holds ids from {int(tokens.min())} to {int(tokens.max())}; the vocabulary is 0 … {last}")

    def _check_lengths(self, cu_seqlens: Tensor) -> None:
        longest = int(cu_seqlens.diff().max()) if cu_seqlens.device.type == "cpu" and len(cu_seqlens) > 1 else 0
        if longest > self.config.max_position_embeddings:
            raise ValueError(f"a document of {longest} tokens passes max_position_embeddings={self.config.max_position_embeddings}; cut it")


def _always_ready(_module: nn.Module) -> None:
    pass


def _run(forward: Callable[..., BlockOutput], *args: Any) -> BlockOutput:
    return forward(*args)


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The first value of a parameter, float32: ones for norms, zeros for biases, normal for the rest."""
    if "norm" in name:
        return torch.ones(shape, device=device)
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    residual = name.endswith(("o_proj.weight", "mlp.down.weight", "shared.down.weight", "mlp.w2"))
    std = config.init_std / math.sqrt(2 * config.num_layers) if residual else config.init_std
    # torch's CPU generator reads the low 32 bits of its seed alone, so both numbers must be mixed into all of them.
    mixed = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator(device).manual_seed(int.from_bytes(mixed) % 2**63)
    return torch.randn(shape, generator=generator, device=device) * std


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those active for one token: all but the routed experts it does not visit."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    idle = config.moe.num_experts - config.moe.top_k
    routed = sum((m.w13[0].numel() + m.w2[0].numel()) for m in mixtures(model))
    return total, total - idle * routed


def mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    return (m for m in model.modules() if isinstance(m, MixtureOfExperts))

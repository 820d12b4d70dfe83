"""The architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nsa_transformer.config.fields import ConfigError, check_types, doc, need, not_negative, positive


@dataclass(frozen=True)
class NSAConfig:
    """Geometry of Native Sparse Attention (arXiv 2502.11089, section 3.3; the defaults are the paper's)."""

    compress_block: int = doc("Tokens that one compressed token stands for (the paper's l).", 32)
    compress_stride: int = doc("Tokens between the starts of two compressed tokens (d). Divides compress_block and select_block.", 16)
    select_block: int = doc("Tokens in one selection block (l'). At least compress_block.", 64)
    num_selected: int = doc("Blocks each query attends to, forced ones included (n).", 16)
    num_initial: int = doc("Blocks at the start of the document that are always selected.", 1)
    num_local: int = doc("Blocks ending with the query's own that are always selected.", 2)
    window: int = doc("Keys of the sliding window, the query's own included (w).", 512)
    compression: Literal["mlp", "mean"] = doc(
        "How the keys (and values) of a block become one: an MLP over the block with learned intra-block positions (the paper), or their mean.",
        "mlp",
    )

    def __post_init__(self) -> None:
        check_types(self)
        positive(self, "compress_block", "compress_stride", "select_block", "num_selected", "window")
        not_negative(self, "num_initial", "num_local")
        block, stride, select = self.compress_block, self.compress_stride, self.select_block
        need(block % stride == 0, f"compress_stride={stride} must divide compress_block={block}; for example compress_stride={max(block // 2, 1)}")
        need(select % stride == 0, f"compress_stride={stride} must divide select_block={select}; for example select_block={2 * block}")
        need(block <= select, f"compress_block={block} must not exceed select_block={select}; for example select_block={2 * block}")
        forced = self.num_initial + self.num_local
        need(
            self.num_selected >= forced,
            f"num_selected={self.num_selected} is fewer than the {forced} forced blocks (num_initial + num_local); write num_selected={forced} or more",
        )
        need(self.compression in ("mlp", "mean"), f"compression={self.compression!r} is unknown; write mlp or mean")


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers in the manner of DeepSeekMoE (arXiv 2401.06066) with bias-based balancing (arXiv 2408.15664)."""

    num_experts: int = doc("Routed experts per layer. 0: every layer is a dense MLP.", 16)
    top_k: int = doc("Routed experts that each token visits. 1: the only weight is renormalised to 1, so the loss teaches the router nothing.", 4)
    expert_size: int = doc("Hidden width of one expert (SwiGLU).", 384)
    num_shared_experts: int = doc("Experts that every token visits, computed as one MLP of num_shared_experts * expert_size.", 1)
    num_dense_layers: int = doc("First layers that keep a dense MLP instead of experts.", 1)
    score: Literal["sigmoid", "softmax"] = doc("What a router's logits become: scores of each expert by itself, or shares of 1 over all of them.", "sigmoid")
    num_groups: int = doc("Groups of neighbouring experts, of which a token visits the experts of top_groups alone (arXiv 2412.19437). 1: no groups.", 1)
    top_groups: int = doc("Groups that each token visits: those whose two best experts score highest.", 1)
    routed_scaling: float = doc("Factor on the renormalised routing weights.", 1.0)
    bias_update_rate: float = doc("Step of the balancing bias, once per optimizer step. 0 turns bias-based balancing off.", 0.001)
    sequence_loss_weight: float = doc("Weight of the sequence-wise balance loss. 0: off.", 0.0001)
    global_loss_weight: float = doc(
        "Weight of the balance loss over all tokens of an optimizer step, of all ranks and of its passes so far (arXiv 2501.11873). 0: off.", 0.0
    )
    z_loss_weight: float = doc("Weight of the router z-loss. 0: off.", 0.0)
    forced_balance: bool = doc("For benchmarks: experts take turns whatever the router says, so all have the same load. The model learns no routing.", False)

    def __post_init__(self) -> None:
        check_types(self)
        not_negative(self, "num_experts", "num_shared_experts", "num_dense_layers", "bias_update_rate")
        not_negative(self, "sequence_loss_weight", "global_loss_weight", "z_loss_weight")
        positive(self, "top_k", "expert_size", "routed_scaling", "num_groups", "top_groups")
        if self.num_experts:
            need(
                self.top_k <= self.num_experts,
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; write top_k={self.num_experts} or fewer",
            )
            need(
                self.num_experts % self.num_groups == 0,
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}; write num_groups=1 or a divisor",
            )
            need(self.top_groups <= self.num_groups, f"top_groups={self.top_groups} is more than num_groups={self.num_groups}; write that or fewer")
            reach = self.top_groups * (self.num_experts // self.num_groups)
            need(self.top_k <= reach, f"top_k={self.top_k} is more than the {reach} experts of top_groups={self.top_groups}; write top_k={reach} or fewer")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer. Defaults: the `base` model."""

    vocab_size: int = doc("Rows of the embedding. The tokenizer trained at first run gets this many tokens.", 32768)
    hidden_size: int = doc("Width of the residual stream.", 768)
    num_layers: int = doc("Transformer blocks.", 12)
    num_heads: int = doc("Query heads.", 16)
    num_kv_heads: int = doc("Key/value heads. Divides num_heads; all query heads of a group share the selected blocks.", 2)
    head_dim: int = doc("Width of a query and key head. Even, for the rotation.", 64)
    head_dim_v: int | None = doc("Width of a value head. null: head_dim.", None)
    intermediate_size: int = doc("Hidden width of the dense MLP (SwiGLU) in layers without experts.", 2048)
    attention: Literal["nsa", "dense", "window"] = doc(
        "nsa, or its controls on torch's own attention: dense (full causal) and window (only nsa.window keys).", "nsa"
    )
    nsa: NSAConfig = doc("Geometry of the attention.", factory=NSAConfig)
    moe: MoEConfig = doc("Experts.", factory=MoEConfig)
    max_position_embeddings: int = doc("Longest position the model is built for, in tokens.", 32768)
    original_max_position_embeddings: int | None = doc(
        "Length the weights were trained at. YaRN (arXiv 2309.00071) stretches the rotation where max_position_embeddings exceeds it. null: no scaling.", None
    )
    rope_theta: float = doc("Base of the rotary embedding.", 500000.0)
    norm_eps: float = doc("Epsilon of RMSNorm.", 1e-6)
    tie_embeddings: bool = doc("Share the embedding with the output projection.", True)
    init_std: float = doc("Standard deviation of the initial weights; residual projections get init_std / sqrt(2 * num_layers).", 0.02)

    def __post_init__(self) -> None:
        check_types(self)
        positive(
            self,
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "rope_theta",
            "norm_eps",
            "init_std",
        )
        if self.num_heads % self.num_kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}; write one of {', '.join(map(str, fits))}")
        need(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for the rotary embedding; write {self.head_dim + 1}")
        need(self.head_dim_v is None or self.head_dim_v > 0, f"head_dim_v={self.head_dim_v} must be greater than 0, or null for head_dim")
        need(self.attention in ("nsa", "dense", "window"), f"attention={self.attention!r} is unknown; write nsa, dense or window")
        original = self.original_max_position_embeddings
        need(original is None or original > 0, f"original_max_position_embeddings={original} must be greater than 0, or null for no scaling")
        need(
            original is None or original <= self.max_position_embeddings,
            f"original_max_position_embeddings={original} exceeds max_position_embeddings={self.max_position_embeddings}; "
            f"write max_position_embeddings={original} or more",
        )

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def layer_has_experts(self, layer: int) -> bool:
        return self.moe.num_experts > 0 and layer >= self.moe.num_dense_layers

    @property
    def has_experts(self) -> bool:
        return any(map(self.layer_has_experts, range(self.num_layers)))

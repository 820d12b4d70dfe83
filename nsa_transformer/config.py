"""Every setting of the project as a plain dataclass, checked when it is built.

`configs/*.yaml` holds the same keys with the same defaults; `build_config` merges a nested mapping onto these classes.
A wrong key, type, value or combination raises `ConfigError` whose text names the override to type instead.
This module imports the standard library alone, so that the kernels can use `NSAConfig` without Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "LoggingConfig",
    "MemoryConfig",
    "MixtureSource",
    "ModelConfig",
    "MoEConfig",
    "NSAConfig",
    "RecipeConfig",
    "TrainingConfig",
    "build_config",
    "to_dict",
    "unsupported_options",
]


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was wrong and what to write instead."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _need(value > 0, f"{name}={value} must be greater than 0")


def _not_negative(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        _need(value >= 0, f"{name}={value} must be 0 or greater")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _check_types(obj: Any) -> None:
    """Of a class that callers build themselves; `build_config` has checked already."""
    cls: Any = type(obj)
    for name, kind in _hints(cls).items():
        value = getattr(obj, name)
        if dataclasses.is_dataclass(kind):
            _need(isinstance(value, typing.cast(type, kind)), f"{name} is {type(value).__name__}; give a {typing.cast(type, kind).__name__}")
        else:
            _coerce(name, value, kind)


def doc(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its explanation; `docs/configuration.md` is generated from these."""
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


# --------------------------------------------------------------------------------------------------------- model


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
        _check_types(self)
        _positive(self, "compress_block", "compress_stride", "select_block", "num_selected", "window")
        _not_negative(self, "num_initial", "num_local")
        block, stride, select = self.compress_block, self.compress_stride, self.select_block
        _need(block % stride == 0, f"compress_stride={stride} must divide compress_block={block}; for example compress_stride={max(block // 2, 1)}")
        _need(select % stride == 0, f"compress_stride={stride} must divide select_block={select}; for example select_block={2 * block}")
        _need(block <= select, f"compress_block={block} must not exceed select_block={select}; for example select_block={2 * block}")
        forced = self.num_initial + self.num_local
        _need(
            self.num_selected >= forced,
            f"num_selected={self.num_selected} is fewer than the {forced} forced blocks (num_initial + num_local); write num_selected={forced} or more",
        )
        _need(self.compression in ("mlp", "mean"), f"compression={self.compression!r} is unknown; write mlp or mean")


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts layers in the manner of DeepSeekMoE (arXiv 2401.06066) with bias-based balancing (arXiv 2408.15664)."""

    num_experts: int = doc("Routed experts per layer. 0: every layer is a dense MLP.", 16)
    top_k: int = doc("Routed experts that each token visits.", 4)
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
        _check_types(self)
        _not_negative(self, "num_experts", "num_shared_experts", "num_dense_layers", "bias_update_rate")
        _not_negative(self, "sequence_loss_weight", "global_loss_weight", "z_loss_weight")
        _positive(self, "top_k", "expert_size", "routed_scaling", "num_groups", "top_groups")
        if self.num_experts:
            _need(
                self.top_k <= self.num_experts,
                f"top_k={self.top_k} is more than num_experts={self.num_experts}; write top_k={self.num_experts} or fewer",
            )
            _need(
                self.num_experts % self.num_groups == 0,
                f"num_groups={self.num_groups} does not divide num_experts={self.num_experts}; write num_groups=1 or a divisor",
            )
            _need(self.top_groups <= self.num_groups, f"top_groups={self.top_groups} is more than num_groups={self.num_groups}; write that or fewer")
            reach = self.top_groups * (self.num_experts // self.num_groups)
            _need(self.top_k <= reach, f"top_k={self.top_k} is more than the {reach} experts of top_groups={self.top_groups}; write top_k={reach} or fewer")


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
        _check_types(self)
        _positive(
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
        _need(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for the rotary embedding; write {self.head_dim + 1}")
        _need(self.head_dim_v is None or self.head_dim_v > 0, f"head_dim_v={self.head_dim_v} must be greater than 0, or null for head_dim")
        _need(self.attention in ("nsa", "dense", "window"), f"attention={self.attention!r} is unknown; write nsa, dense or window")
        original = self.original_max_position_embeddings
        _need(original is None or original > 0, f"original_max_position_embeddings={original} must be greater than 0, or null for no scaling")
        _need(
            original is None or original <= self.max_position_embeddings,
            f"original_max_position_embeddings={original} exceeds max_position_embeddings={self.max_position_embeddings}; "
            f"write max_position_embeddings={original} or more",
        )

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def layer_has_experts(self, layer: int) -> bool:
        return self.moe.num_experts > 0 and layer >= self.moe.num_dense_layers


# -------------------------------------------------------------------------------------------- training, memory, data


@dataclass(frozen=True)
class RecipeConfig:
    """Sizes that suit a model; each `configs/model/*.yaml` brings its own. `training/base.yaml` and `data/base.yaml` read
    them, so override those keys (`training.max_steps=…`), which win over these."""

    max_length: int = doc("Becomes data.max_length.", 4096)
    batch_size: int = doc("Becomes training.batch_size.", 16)
    max_steps: int = doc("Becomes training.max_steps.", 2000)
    learning_rate: float = doc("Becomes training.learning_rate.", 6e-4)
    warmup_steps: int = doc("Becomes training.warmup_steps.", 100)
    eval_every: int = doc("Becomes training.eval_every.", 200)
    checkpoint_every: int = doc("Becomes training.checkpoint_every.", 200)
    precision: Literal["bf16", "fp32"] = doc("Becomes training.precision.", "bf16")
    cpu_threads: int | None = doc("Becomes training.cpu_threads.", None)


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer, its schedule, and how a run starts, saves and continues."""

    max_steps: int = doc("Optimizer steps of the whole run.", 2000)
    batch_size: int = doc("Packs per optimizer step over all ranks.", 16)
    micro_batch_size: int = doc("Packs per rank and pass; accumulation follows and must divide.", 1)
    learning_rate: float = doc("Peak learning rate.", 6e-4)
    min_lr_ratio: float = doc("Final learning rate as a share of the peak.", 0.1)
    warmup_steps: int = doc("Steps of linear warm-up.", 100)
    schedule: Literal["cosine", "wsd"] = doc("cosine, or wsd: warm-up, stable, then linear decay over the last decay_fraction of the run.", "cosine")
    decay_fraction: float = doc("Share of the run that wsd decays over.", 0.2)
    weight_decay: float = doc("AdamW's decay on matrices (not on norms, biases, embeddings).", 0.1)
    beta1: float = doc("AdamW's first moment.", 0.9)
    beta2: float = doc("AdamW's second moment.", 0.95)
    adam_eps: float = doc("AdamW's epsilon.", 1e-8)
    max_grad_norm: float = doc("Gradient clipping by global norm.", 1.0)
    precision: Literal["bf16", "fp32"] = doc("bf16: autocast of matrix products over fp32 weights. fp32: no autocast.", "bf16")
    compile: bool = doc("torch.compile of each block.", False)
    loss_chunk_size: int = doc("Tokens whose logits exist at once in the cross-entropy.", 2048)
    eval_every: int = doc("Steps between validations; the last step always validates. 0: only then.", 200)
    eval_packs: int = doc("Packs of validation data per validation, the same ones each time.", 32)
    checkpoint_every: int = doc("Steps between checkpoints; the last step always saves. 0: only then.", 200)
    keep_checkpoints: int = doc("Newest complete checkpoints to keep.", 2)
    seed: int = doc("Seed of the initial weights and of the order of the data.", 0)
    resume: str | None = doc(
        "null: start fresh, and refuse a run_dir that already holds checkpoints. auto: continue the newest checkpoint of run_dir that verifies, "
        "or start fresh where there is none. A path: continue exactly that checkpoint.",
        None,
    )
    init_from: str | None = doc("Start from the weights of a run, checkpoint or export, with a fresh optimizer.", None)
    device: Literal["auto", "cpu", "cuda"] = doc("auto: cuda where there is one.", "auto")
    cpu_threads: int | None = doc(
        "Threads of each rank's matrix products on a CPU, or, with a GPU, of an offloaded optimizer. null: torch's own choice, which is every core or "
        "OMP_NUM_THREADS; for the optimizer beside a GPU every core but two.",
        None,
    )
    expert_parallel_size: int = doc(
        "Ranks that share one set of experts; tokens travel to theirs by all-to-all. Divides the number of ranks and model.moe.num_experts.", 1
    )
    context_parallel_size: int = doc("Ranks that share one pack.", 1)

    def __post_init__(self) -> None:
        _positive(
            self,
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "learning_rate",
            "adam_eps",
            "max_grad_norm",
            "loss_chunk_size",
            "eval_packs",
            "keep_checkpoints",
            "expert_parallel_size",
            "context_parallel_size",
        )
        _not_negative(self, "warmup_steps", "weight_decay", "eval_every", "checkpoint_every", "seed")
        _need(self.cpu_threads is None or self.cpu_threads > 0, f"cpu_threads={self.cpu_threads} must be greater than 0, or null for torch's own choice")
        _need(self.seed < 2**63, f"seed={self.seed} must be below 2**63")
        _need(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio={self.min_lr_ratio} must lie in 0 … 1")
        _need(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction} must lie in 0 … 1, above 0")
        for name in ("beta1", "beta2"):
            _need(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in 0 … 1, below 1")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} must divide batch_size={self.batch_size}; "
                f"write training.micro_batch_size=1 or training.batch_size={self.micro_batch_size * max(1, self.batch_size // self.micro_batch_size)}"
            )


@dataclass(frozen=True)
class KVCacheConfig:
    """Key/value cache of generation. In training: the saved default for samples and `nsa generate`."""

    quantization: Literal["none", "fp8"] = doc("none: keys and values in the compute dtype. fp8: blocks older than threshold in e4m3.", "none")
    threshold: int = doc("With fp8: the newest tokens that stay in the compute dtype.", 512)

    def __post_init__(self) -> None:
        _not_negative(self, "threshold")


@dataclass(frozen=True)
class ExpertOffloadingConfig:
    """Experts in host memory; gpu_budget_gib, policy and prefetch are of generation, in training its saved default."""

    enabled: bool = doc(
        "Keep the routed experts in host memory and bring them to the GPU as they are needed; in training layer by layer in each pass, and the optimizer "
        "is then in host memory too. One process.",
        False,
    )
    pin_memory: bool = doc(
        "With enabled: page-lock the host memory of the experts, so that the GPU reads it itself. false: copies go through the host, several times slower.",
        True,
    )
    gpu_budget_gib: float | None = doc(
        "With enabled: GiB of GPU memory for experts, the slots of those at hand and the buffers of a prompt together. "
        "null: three quarters of what is free once the rest of the model is loaded.",
        None,
    )
    policy: Literal["lru", "frequency"] = doc(
        "With enabled: which expert leaves its slot, the one not needed for longest or the one needed least often (uses count half after 64 tokens).", "lru"
    )
    prefetch: int = doc(
        "With enabled: experts per token, the likeliest by the next layer's router on this layer's input, that are copied while this layer computes. Worth it "
        "where the link has time to spare; a wrong guess costs a copy. 0: none.",
        0,
    )

    def __post_init__(self) -> None:
        budget = self.gpu_budget_gib
        _need(budget is None or 0 < budget < math.inf, f"gpu_budget_gib={budget} must be greater than 0 and finite, or null")
        _not_negative(self, "prefetch")
        _need(self.pin_memory or not self.prefetch, f"prefetch={self.prefetch} needs page-locked memory; write prefetch=0 or pin_memory=true")


@dataclass(frozen=True)
class OptimizerOffloadingConfig:
    enabled: bool = doc(
        "Keep float32 weights, AdamW's moments and the sums of gradients in host memory and update them on the CPU, while the GPU goes on; it holds the "
        "weights in the dtype that passes compute in. One process.",
        False,
    )


@dataclass(frozen=True)
class CudaKernelsConfig:
    enable_hbm_optimizations: bool = doc("CUDA kernels with TMA loads and L2-aware order.", False)
    enable_bank_conflict_avoidance: bool = doc("CUDA kernels with swizzled shared memory.", False)


@dataclass(frozen=True)
class MemoryConfig:
    """What trades time for memory."""

    activation_checkpointing: Literal["none", "selective", "full"] = doc(
        "none: keep all activations. selective: keep attention and expert outputs, recompute the cheap rest. "
        "full: keep each block's input, recompute the block.",
        "none",
    )
    kv_cache: KVCacheConfig = doc("Key/value cache.", factory=KVCacheConfig)
    expert_offloading: ExpertOffloadingConfig = doc("Experts in host memory.", factory=ExpertOffloadingConfig)
    optimizer_offloading: OptimizerOffloadingConfig = doc("The optimizer in host memory, in training.", factory=OptimizerOffloadingConfig)
    cuda_kernels: CudaKernelsConfig = doc("The CUDA C++ extension.", factory=CudaKernelsConfig)

    @property
    def offloads_optimizer(self) -> bool:
        """In training: asked for, or because the experts are offloaded."""
        return self.optimizer_offloading.enabled or self.expert_offloading.enabled


@dataclass(frozen=True)
class MixtureSource:
    """One source of `data.mixture`."""

    path: str = doc("As data.path.")
    weight: float | None = doc("Share of the packs, in proportion to the other sources' weights.", None)
    epochs: float | None = doc("In place of weight: how often the source is read while one with epochs 1 is read once.", None)
    text_column: str | None = doc("Column or key of the text. null: as data.text_column or data.messages_column say.", None)
    messages_column: str | None = doc("Column or key of conversations, in place of text.", None)

    def __post_init__(self) -> None:
        both = self.text_column is not None and self.messages_column is not None
        _need(not both, f"path={self.path} has a text_column and a messages_column; a source is read for one of them")
        _need((self.weight is None) != (self.epochs is None), f"path={self.path} needs a weight or epochs, and not both; write weight: 1 for equal shares")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            _need(value is None or value > 0, f"{name}={value} must be greater than 0; leave a source out that is not to be read")


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    path: str | None = doc(
        "Text, JSONL or parquet: a file, a folder (searched recursively), a glob, or a URL of one of these that fsspec reads; or "
        "`hf://NAME[:CONFIG][@SPLIT][?REVISION]`, a dataset by name. null: the source of Python's own standard library, which every machine has.",
        None,
    )
    mixture: tuple[MixtureSource, ...] = doc(
        "Several sources in place of path: a list of groups with `path`, `weight` (share of the packs) or `epochs` (how often it is read while a source with "
        "epochs 1 is read once), and `text_column` or `messages_column` where they differ.",
        (),
    )
    val_path: str | None = doc("Separate validation data. null: val_fraction of the documents of path, chosen by a hash of their names.", None)
    val_fraction: float = doc("Share of the documents held out for validation.", 0.05)
    text_column: str = doc("Column or key that holds the text in JSONL and parquet.", "text")
    messages_column: str | None = doc(
        "Column or key that holds conversations, lists of {role, content}, to be read in place of text. The tokenizer needs <|im_start|> and <|im_end|>; one "
        "that is trained here gets them. null: text.",
        None,
    )
    assistant_only_loss: bool = doc("With conversations: learn only what the assistant writes, its contents and the <|im_end|> behind them.", False)
    max_bad_documents: int = doc(
        "Documents of each source that may be left out, with a message, because they are no text or damaged: a file, line or row, or the rest of a "
        "damaged file. One more refuses the corpus.",
        0,
    )
    max_length: int = doc("Tokens per pack.", 4096)
    tokenizer: str | None = doc(
        "A tokenizer.json, or a folder or run that has one. null: a byte-level BPE of model.vocab_size tokens is trained on path and cached.", None
    )
    pack_buffer: int = doc("Documents among which best-fit packing chooses.", 4096)
    length_curriculum: int = doc(
        "Packs at the start of the first epoch that come sorted, those of short documents first: the same packs, in that order. 0: none.", 0
    )
    num_workers: int = doc(
        "Processes that tokenise a corpus which is not in the cache yet; the tokens are the same for any number. 0: the process that trains. Packs need none.",
        0,
    )
    cache_dir: str | None = doc("Where tokenizers and tokenised corpora are cached. null: $XDG_CACHE_HOME/nsa-transformer or ~/.cache/nsa-transformer.", None)

    def __post_init__(self) -> None:
        _positive(self, "max_length", "pack_buffer")
        _not_negative(self, "length_curriculum", "max_bad_documents", "num_workers")
        _need(self.path is None or not self.mixture, f"path={self.path} and data.mixture exclude each other; write data.path=null, or name it in the mixture")
        _need(len({part.weight is None for part in self.mixture}) < 2, "mixture has weights and epochs; give every source the one or the other")
        _need(not self.mixture or not self.length_curriculum, "length_curriculum does not go with data.mixture; write data.length_curriculum=0")
        _need(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")


@dataclass(frozen=True)
class WandbConfig:
    project: str | None = doc("Weights & Biases project. null: off. Without an account or network the run is recorded offline.", None)
    entity: str | None = doc("Account or team. null: your default.", None)

    def __post_init__(self) -> None:
        _need(self.entity is None or self.project is not None, "entity needs a project as well; write logging.wandb.project=NAME")


@dataclass(frozen=True)
class ProfilingConfig:
    enabled: bool = doc("Write a torch trace of a few steps to the run's profiler/.", False)
    trace_memory: bool = doc("With enabled: also record allocations, and on CUDA write a memory snapshot.", False)
    start_step: int = doc("First step of this process that is traced, after so many warm-up steps.", 5)
    num_steps: int = doc("Steps traced.", 3)

    def __post_init__(self) -> None:
        _positive(self, "start_step", "num_steps")
        _need(self.enabled or not self.trace_memory, "trace_memory=true needs profiling; write logging.profiling.enabled=true")


@dataclass(frozen=True)
class LoggingConfig:
    """What a person sees of a run."""

    log_every: int = doc("Steps between rows of metrics.jsonl and lines on the screen.", 10)
    tensorboard: bool = doc("Write TensorBoard events to the run's tensorboard/.", True)
    plots: bool = doc("Write plots/*.png and sample.txt at the end.", True)
    sample_tokens: int = doc("Tokens of the sample text at the end. 0: no sample.", 128)
    wandb: WandbConfig = doc("Weights & Biases.", factory=WandbConfig)
    profiling: ProfilingConfig = doc("torch profiler.", factory=ProfilingConfig)

    def __post_init__(self) -> None:
        _positive(self, "log_every")
        _not_negative(self, "sample_tokens")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = doc("Architecture: tiny, base, large or nsa_27b.", factory=ModelConfig)
    training: TrainingConfig = doc("Optimisation and checkpoints.", factory=TrainingConfig)
    memory: MemoryConfig = doc("Memory for time.", factory=MemoryConfig)
    data: DataConfig = doc("Corpus, tokenizer, packs.", factory=DataConfig)
    logging: LoggingConfig = doc("Screen, metrics, traces.", factory=LoggingConfig)
    recipe: RecipeConfig = doc("Sizes that come with the model group.", factory=RecipeConfig)
    run_dir: str | None = doc("Folder of the run. null: runs/<timestamp>.", None)

    def __post_init__(self) -> None:
        length, positions = self.data.max_length, self.model.max_position_embeddings
        _need(
            length <= positions,
            f"data.max_length={length} is longer than model.max_position_embeddings={positions}; write model.max_position_embeddings={length} "
            f"(and model.original_max_position_embeddings={positions} if the weights were trained at {positions}) or data.max_length={positions}",
        )
        _need(
            self.memory.kv_cache.quantization == "none" or self.model.attention == "nsa",
            f"memory.kv_cache.quantization={self.memory.kv_cache.quantization} is for model.attention=nsa, not {self.model.attention}; "
            "write memory.kv_cache.quantization=none",
        )
        _need(
            self.training.resume is None or self.training.init_from is None,
            "training.resume and training.init_from exclude each other: one continues a run, the other starts a new one; drop one of them",
        )
        ahead, top_k = self.memory.expert_offloading.prefetch, self.model.moe.top_k
        _need(ahead <= top_k, f"memory.expert_offloading.prefetch={ahead} is more than model.moe.top_k={top_k}; write {top_k} or fewer")
        size, experts = self.training.expert_parallel_size, self.model.moe.num_experts
        has_experts = any(map(self.model.layer_has_experts, range(self.model.num_layers)))
        _need(size == 1 or has_experts, f"training.expert_parallel_size={size}, and no layer of the model has experts; write training.expert_parallel_size=1")
        fits = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        _need(experts % size == 0, f"training.expert_parallel_size={size} does not divide model.moe.num_experts={experts}; write one of {fits}")


def unsupported_options(config: Config) -> list[str]:
    """Options that are valid but that nothing implements yet, each as a sentence naming its key. A run refuses to start on any."""
    kernels, training = config.memory.cuda_kernels, config.training
    found = []
    for name in ("enable_hbm_optimizations", "enable_bank_conflict_avoidance"):
        if getattr(kernels, name):
            found.append(f"memory.cuda_kernels.{name}=true is not built yet; write memory.cuda_kernels.{name}=false")
    if training.context_parallel_size != 1:
        found.append(f"training.context_parallel_size={training.context_parallel_size} is not built yet; write training.context_parallel_size=1")
    return found


# ------------------------------------------------------------------------------------------------ mapping <-> classes

T = TypeVar("T")


def build_config(values: Mapping[str, Any], cls: type[T] = Config, path: str = "") -> T:  # type: ignore[assignment]
    """Merge a nested mapping onto `cls`; keys left out keep their defaults.

    Raises `ConfigError` on an unknown key, a wrong type or a value that `cls` refuses; the text starts with the full key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a group of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(unknown_key_message(full))
        kind = hints[key]
        built[key] = build_config(value, kind, full) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else _coerce(full, value, kind)
    for f in dataclasses.fields(typing.cast(Any, cls)):
        if f.name not in built and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path} needs a {f.name}; write {f.name}: …")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, refusing what is not of that type; whole numbers pass as floats, `1e3` as an int is refused."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices or isinstance(value, bool):
            raise ConfigError(f"{key}={_show(value)} is unknown; write one of {', '.join(map(str, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
        return _coerce(key, value, kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={_show(value)} must be a list of groups, such as [{{path: a, weight: 1}}, {{path: b, weight: 2}}]")
        (part, _) = typing.get_args(kind)
        return tuple(item if isinstance(item, part) else build_config(item, part, f"{key}[{number}]") for number, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number; write one")
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{key}={_show(value)} must be {names[kind]}")
    return value


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def all_keys(cls: type = Config, path: str = "") -> list[str]:
    """Every leaf key, dotted, in order of declaration."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        full = f"{path}.{name}" if path else name
        keys += all_keys(kind, full) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else [full]
    return keys


def unknown_key_message(key: str) -> str:
    """What to say of a key that does not exist: the nearest ones that do."""
    keys = all_keys() if "." in key else [*all_keys(), *(f.name for f in dataclasses.fields(Config))]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near][:2]
    hint = f"; did you mean {' or '.join(near)}?" if near else "; docs/configuration.md lists every key"
    return f"unknown key {key}{hint}"


def to_dict(config: Any) -> dict[str, Any]:
    """The nested mapping that `build_config` takes back, with lists for tuples, as YAML has them."""
    plain: dict[str, Any] = _without_tuples(dataclasses.asdict(config))
    return plain


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(part) for key, part in value.items()}
    return [_without_tuples(part) for part in value] if isinstance(value, list | tuple) else value

"""A whole run: optimisation, memory, data, logging, and the model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nsa_transformer.config.fields import ConfigError, doc, need, not_negative, positive
from nsa_transformer.config.model import ModelConfig


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
        positive(
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
        not_negative(self, "warmup_steps", "weight_decay", "eval_every", "checkpoint_every", "seed")
        need(self.cpu_threads is None or self.cpu_threads > 0, f"cpu_threads={self.cpu_threads} must be greater than 0, or null for torch's own choice")
        need(self.seed < 2**63, f"seed={self.seed} must be below 2**63")
        need(0 <= self.min_lr_ratio <= 1, f"min_lr_ratio={self.min_lr_ratio} must lie in 0 … 1")
        need(0 < self.decay_fraction <= 1, f"decay_fraction={self.decay_fraction} must lie in 0 … 1, above 0")
        for name in ("beta1", "beta2"):
            need(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must lie in 0 … 1, below 1")
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
        not_negative(self, "threshold")


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
        "With enabled: which expert leaves its slot, the one not needed for longest or the one needed least often (uses count half after 64 tokens).",
        "frequency",
    )
    prefetch: int = doc(
        "With enabled: experts per token, the likeliest by the next layer's router on this layer's input, that are copied while this layer computes. Worth it "
        "where the link has time to spare; a wrong guess costs a copy. 0: none.",
        0,
    )

    def __post_init__(self) -> None:
        budget = self.gpu_budget_gib
        need(budget is None or 0 < budget < math.inf, f"gpu_budget_gib={budget} must be greater than 0 and finite, or null")
        not_negative(self, "prefetch")
        need(self.pin_memory or not self.prefetch, f"prefetch={self.prefetch} needs page-locked memory; write prefetch=0 or pin_memory=true")


@dataclass(frozen=True)
class OptimizerOffloadingConfig:
    enabled: bool = doc(
        "Keep float32 weights, AdamW's moments and the sums of gradients in host memory, page-locked; the CPU and the GPU update them together, while the next "
        "pass goes on with the layers that are done. The GPU holds the weights in the dtype that passes compute in. One process.",
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
        need(not both, f"path={self.path} has a text_column and a messages_column; a source is read for one of them")
        need((self.weight is None) != (self.epochs is None), f"path={self.path} needs a weight or epochs, and not both; write weight: 1 for equal shares")
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            need(value is None or value > 0, f"{name}={value} must be greater than 0; leave a source out that is not to be read")


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
        positive(self, "max_length", "pack_buffer")
        not_negative(self, "length_curriculum", "max_bad_documents", "num_workers")
        need(self.path is None or not self.mixture, f"path={self.path} and data.mixture exclude each other; write data.path=null, or name it in the mixture")
        need(len({part.weight is None for part in self.mixture}) < 2, "mixture has weights and epochs; give every source the one or the other")
        need(not self.mixture or not self.length_curriculum, "length_curriculum does not go with data.mixture; write data.length_curriculum=0")
        need(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")


@dataclass(frozen=True)
class WandbConfig:
    project: str | None = doc("Weights & Biases project. null: off. Without an account or network the run is recorded offline.", None)
    entity: str | None = doc("Account or team. null: your default.", None)

    def __post_init__(self) -> None:
        need(self.entity is None or self.project is not None, "entity needs a project as well; write logging.wandb.project=NAME")


@dataclass(frozen=True)
class ProfilingConfig:
    enabled: bool = doc("Write a torch trace of a few steps to the run's profiler/.", False)
    trace_memory: bool = doc("With enabled: also record allocations, and on CUDA write a memory snapshot.", False)
    start_step: int = doc("First step of this process that is traced, after so many warm-up steps.", 5)
    num_steps: int = doc("Steps traced.", 3)

    def __post_init__(self) -> None:
        positive(self, "start_step", "num_steps")
        need(self.enabled or not self.trace_memory, "trace_memory=true needs profiling; write logging.profiling.enabled=true")


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
        positive(self, "log_every")
        not_negative(self, "sample_tokens")


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
        need(
            length <= positions,
            f"data.max_length={length} is longer than model.max_position_embeddings={positions}; write model.max_position_embeddings={length} "
            f"(and model.original_max_position_embeddings={positions} if the weights were trained at {positions}) or data.max_length={positions}",
        )
        need(
            self.memory.kv_cache.quantization == "none" or self.model.attention == "nsa",
            f"memory.kv_cache.quantization={self.memory.kv_cache.quantization} is for model.attention=nsa, not {self.model.attention}; "
            "write memory.kv_cache.quantization=none",
        )
        need(
            self.training.resume is None or self.training.init_from is None,
            "training.resume and training.init_from exclude each other: one continues a run, the other starts a new one; drop one of them",
        )
        ahead, top_k = self.memory.expert_offloading.prefetch, self.model.moe.top_k
        need(ahead <= top_k, f"memory.expert_offloading.prefetch={ahead} is more than model.moe.top_k={top_k}; write {top_k} or fewer")
        size, experts = self.training.expert_parallel_size, self.model.moe.num_experts
        need(
            size == 1 or self.model.has_experts,
            f"training.expert_parallel_size={size}, and no layer of the model has experts; write training.expert_parallel_size=1",
        )
        need(
            self.model.has_experts or not self.model.moe.forced_balance,
            "model.moe.forced_balance=true, and no layer of the model has experts; write model.moe.forced_balance=false",
        )
        fits = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        need(experts % size == 0, f"training.expert_parallel_size={size} does not divide model.moe.num_experts={experts}; write one of {fits}")


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

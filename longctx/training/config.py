"""What ``longctx train`` takes, but for what its parts own. No torch here."""

from dataclasses import dataclass, field

from longctx.adapters.config import PeftConfig
from longctx.models.attention_spec import CORE_POSITIONS, HEAD_POOLING
from longctx.training.data.config import DataConfig
from parallel.option import option, parse_size
from parallel.plans import PLANS

ATTENTIONS = ("auto", "dense", "sf", "landmark", "cca")
SF_GROUP_SIZE = 2048
LAYOUT_NAMES = ("balanced", "zigzag", "striped", "contiguous")


@dataclass(frozen=True, slots=True)
class TrainModelConfig:
    """What is trained."""

    path: str = option("demo", "Hugging Face checkpoint folder, or a model that ships: demo, demo_landmark, demo_cca")
    init: str = option("checkpoint", "where weights start: as stored, or random ones", choices=("checkpoint", "random"))
    dtype: str = option(
        "auto",
        "of weights and activations, master weights are float32; auto: bfloat16 but on CPUs that are slow with it",
        choices=("auto", "float32", "bfloat16"),
    )
    device: str = option("auto", "auto: cuda if there is a GPU", choices=("auto", "cpu", "cuda"))
    rope_scaling: str = option(
        "keep",
        "how RoPE is stretched to train.context_length; keep: as the checkpoint has it",
        choices=("keep", "linear", "dynamic", "yarn"),
    )
    rope_theta: float | None = option(None, "RoPE's base; null: the checkpoint's", above=0)


@dataclass(frozen=True, slots=True)
class TrainAttentionConfig:
    """Which attention is trained."""

    name: str = option(
        "auto", "attention in training; auto: what the checkpoint was trained with, else dense", choices=ATTENTIONS
    )
    block_size: int | None = option(
        None, "tokens of a block without its landmark (landmark); null: the checkpoint's, else 63", minimum=1
    )
    group_size: int | None = option(
        None,
        "tokens that attend to each other in shifted sparse attention (sf), null: 2048; tokens of a core (cca), null: "
        "the checkpoint's, else 16",
        minimum=2,
    )
    window: int | None = option(
        None, "tokens that every query sees as they are (cca); null: the checkpoint's, else 1024", minimum=1
    )
    core_position: str | None = option(
        None, "where a core is for RoPE (cca); null: the checkpoint's, else last", choices=CORE_POSITIONS
    )
    head_pooling: str | None = option(
        None,
        "what query heads of a KV head average to weigh a group (cca); null: the checkpoint's, else weights",
        choices=HEAD_POOLING,
    )
    sink_tokens: int = option(4, "first tokens that every query sees in shifted sparse attention (sf)", minimum=0)
    returned_heads: float = option(
        0.25, "share of the shifted heads, half of all, whose shift is taken back (sf)", minimum=0, maximum=1
    )


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How ranks share the work; there are dp_degree x sp_degree."""

    dp_degree: int = option(1, "groups of ranks that each train on sequences of their own", minimum=1)
    sp_degree: int = option(1, "ranks that share a sequence", minimum=1)
    plan: str = option("auto", "exchange plan of attention", choices=("auto", *PLANS))
    layout: str = option("balanced", "who holds which tokens", choices=LAYOUT_NAMES)
    links_file: str | None = option(None, "link model that longctx plan links wrote, for auto")
    timeout_s: float = option(600.0, "seconds to wait for another rank", above=0)


@dataclass(frozen=True, slots=True)
class DeepSpeedConfig:
    """What DeepSpeed shards and offloads."""

    zero_stage: int = option(1, "0: nothing; 1: optimizer; 2: and gradients; 3: and weights", minimum=0, maximum=3)
    offload_optimizer: bool = option(False, "optimizer states and its step on the CPU (stage 1 to 3)")
    offload_params: bool = option(False, "weights on the CPU while they are not used (stage 3)")
    bucket_size: str = option("128MiB", "bytes of gradients that are reduced together", parse=parse_size)
    persistence_threshold: int = option(
        100_000, "weights with fewer elements are kept whole on every rank (stage 3)", minimum=0
    )
    prefetch_size: str = option("64MiB", "bytes of weights that are gathered ahead (stage 3)", parse=parse_size)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning rate over the steps."""

    lr: float = option(2e-5, "highest learning rate", above=0)
    beta1: float = option(0.9, "decay of the mean", minimum=0, maximum=0.9999)
    beta2: float = option(0.95, "decay of the mean square", minimum=0, maximum=0.99999)
    eps: float = option(1e-8, "added to the root of the mean square", above=0)
    weight_decay: float = option(0.0, "of matrices; norms, biases and embeddings have none", minimum=0)
    clip: float = option(1.0, "gradients are scaled down to this norm; 0: never", minimum=0)
    schedule: str = option("cosine", "how the learning rate falls", choices=("cosine", "linear", "wsd", "constant"))
    warmup_steps: int = option(0, "steps over which it rises", minimum=0)
    decay_share: float = option(0.2, "share of the steps over which wsd falls", minimum=0, maximum=1)
    min_lr_ratio: float = option(0.1, "lowest over highest learning rate", minimum=0, maximum=1)


@dataclass(frozen=True, slots=True)
class TrainLoopConfig:
    """How long, and what is kept in memory meanwhile."""

    num_steps: int = option(100, "optimizer steps", minimum=1)
    context_length: int = option(2048, "tokens of a sequence", minimum=2)
    batch_size: int = option(1, "sequences of a step over all ranks; a multiple of parallel.dp_degree", minimum=1)
    seed: int = option(0, "of random weights and dropout", minimum=0)
    eval_every: int = option(0, "steps between evaluations; 0: only at the end, if there is data.eval_path", minimum=0)
    eval_sequences: int = option(16, "sequences of an evaluation", minimum=1)
    activation_checkpointing: bool = option(True, "keep a layer's inputs only, and compute it again in the backward")
    keep_attention: bool = option(True, "keep attention's output, too: it is not computed and exchanged again")
    activation_offload: bool = option(False, "keep those in the host's memory (cuda) or in a file in output (cpu)")
    loss_tile: int = option(1024, "tokens whose logits exist at one time; 0: all", minimum=0)
    mlp_tile: int = option(0, "tokens that an MLP works on at one time; 0: all", minimum=0)
    compact_heap: bool = option(True, "on CPUs, freed tensors go back to the system at once: less memory, slower steps")
    num_threads: int | None = option(None, "CPU threads of a rank; null: cores over ranks on this machine", minimum=1)


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What is written, how often, and what is kept."""

    every: int = option(100, "steps between checkpoints; 0: only at the end", minimum=0)
    keep_last: int = option(2, "newest checkpoints kept", minimum=1)
    keep_best: int = option(0, "best ones by evaluation loss (else training loss) kept besides", minimum=0)
    resume: str = option(
        "auto",
        "go on from output's last checkpoint: auto, if there is one; must; never, which sets them aside",
        choices=("auto", "must", "never"),
    )
    asynchronous: bool = option(True, "written in the background while training goes on")
    export: bool = option(True, "at the end write a Hugging Face (or PEFT) folder, output/final")
    export_dtype: str = option(
        "auto", "of its weights; auto: model.dtype, as they were computed with", choices=("auto", "float32", "bfloat16")
    )


@dataclass(frozen=True, slots=True)
class LoggerConfig:
    """What a run shows and records."""

    every: int = option(1, "steps between lines", minimum=1)
    progress: str = option("auto", "a progress bar; auto: on a terminal", choices=("auto", "true", "false"))
    tensorboard: bool = option(True, "write TensorBoard files into output/tensorboard")
    wandb: str = option(
        "auto",
        "log to Weights & Biases; auto: if installed and WANDB_API_KEY is set",
        choices=("auto", "true", "false"),
    )
    wandb_project: str = option("longctx", "its project there")
    trace_steps: list[int] = option([], "steps to write a Perfetto trace of, into output/trace")
    peak_flops: float | None = option(
        None, "FLOP/s of a rank for the share shown; null: measured at the start", above=0
    )


@dataclass(frozen=True, slots=True)
class TrainClusterConfig:
    """Where ranks run."""

    launcher: str = option(
        "auto",
        "who starts ranks: Ray actors or plain processes; auto: Ray if it is installed",
        choices=("auto", "ray", "local"),
    )
    address: str | None = option(None, "Ray cluster, as HOST:PORT or auto; null: a Ray of our own on this machine")
    cpus_per_rank: float = option(1.0, "CPUs that Ray reserves for a rank", minimum=0)
    gpus_per_rank: float | None = option(None, "GPUs for a rank; null: 1 where model.device is cuda", minimum=0)
    strategy: str = option(
        "PACK", "Ray's placement of ranks on nodes", choices=("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
    )
    max_restarts: int = option(3, "how often the ranks are started again after one was lost", minimum=0)
    start_timeout_s: float = option(300.0, "seconds to wait for room in the cluster", above=0)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything ``longctx train`` takes."""

    output: str = option("runs/train", "folder for checkpoints, logs and the report")
    model: TrainModelConfig = field(default_factory=TrainModelConfig, metadata={"folder": "train_model"})
    data: DataConfig = field(default_factory=DataConfig)
    attention: TrainAttentionConfig = field(default_factory=TrainAttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainLoopConfig = field(default_factory=TrainLoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    cluster: TrainClusterConfig = field(default_factory=TrainClusterConfig, metadata={"folder": "train_cluster"})

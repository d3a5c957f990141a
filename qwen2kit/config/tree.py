"""RunConfig: one complete training run. Plain frozen data; `load` makes it from TOML.

Nodes can also be built in Python: they are ordinary dataclasses and check themselves.
"""

from __future__ import annotations

from dataclasses import field, fields
from math import isfinite
from typing import Literal

from qwen2kit.config.data_tree import DataConfig, EmbeddedData, check_data
from qwen2kit.config.node import check, node
from qwen2kit.config.train_tree import TrainConfig

SHAPE_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip


@node
class ModelConfig:
    """The model to train: a preset (fresh weights) or a checkpoint (fine-tuning).

    Attributes:
        preset: name in `qwen2kit.spec.presets`; exactly one of ``preset`` and ``checkpoint``.
        checkpoint: directory, GGUF file, run directory or hub id.
        tokenizer: where a preset takes its tokenizer from: ``train`` trains one of
            ``vocab_size`` on the data, anything else is a model as in ``checkpoint``.

    The remaining fields override the spec under their Hugging Face names; those that change a
    parameter's shape are for presets only.
    """

    preset: str | None = None
    checkpoint: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    rope_theta: float | None = None

    def __post_init__(self) -> None:
        changed = [name for name in SHAPE_FIELDS if getattr(self, name) is not None]
        check(
            (
                (self.preset is None) != (self.checkpoint is None),
                "set exactly one of preset and checkpoint",
            ),
            (
                self.checkpoint is None or not changed,
                f"a checkpoint's shape cannot be changed: remove {', '.join(changed)}",
            ),
            (
                self.preset is None or self.tokenizer is not None,
                'tokenizer is needed with a preset: "train", or a model to take it from',
            ),
            (
                self.checkpoint is None or self.tokenizer is None,
                "a checkpoint brings its own tokenizer: remove tokenizer",
            ),
        )

    def overrides(self) -> dict[str, int | float | bool]:
        """The spec fields this recipe sets, by name."""
        skipped = ("preset", "checkpoint", "tokenizer")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skipped}
        return {name: value for name, value in values.items() if value is not None}


@node
class ParallelConfig:
    """Processes per mesh axis (`qwen2kit.plan.degrees.Degrees`); all 1 is one process.

    Attributes:
        dp_shard: fully sharded data parallel; 0 takes what the other degrees leave of the
            running processes.
        dp_replicate: replicas of the sharded state (HSDP).
        cp: pieces of the sequence (context parallel).
        tp: pieces of every matrix (tensor and sequence parallel).
        pp: pipeline stages.
        schedule: order of micro-batches in the pipeline.
    """

    dp_shard: int = 0
    dp_replicate: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    schedule: Literal["gpipe", "1f1b"] = "1f1b"

    def __post_init__(self) -> None:
        check(
            (self.dp_shard >= 0, f"dp_shard must not be negative, got {self.dp_shard}"),
            *(
                (getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
                for name in ("dp_replicate", "cp", "tp", "pp")
            ),
        )


@node
class AdapterConfig:
    """Low-rank adapters instead of full fine-tuning; fields as in `LoRAPlan`.

    Attributes:
        targets: names of the linear layers that get an adapter.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    rslora: bool = False
    quantize: Literal["none", "nf4"] = "none"

    def __post_init__(self) -> None:
        known = AdapterConfig.__dataclass_fields__["targets"].default
        check(
            (self.rank >= 1, f"rank must be at least 1, got {self.rank}"),
            (isfinite(self.alpha) and self.alpha > 0, f"alpha must be positive, got {self.alpha}"),
            (0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}"),
            (
                bool(self.targets) and set(self.targets) <= set(known),
                f"targets must be some of {', '.join(known)}",
            ),
        )


@node
class CheckpointConfig:
    """When to save.

    Attributes:
        every: steps between checkpoints; 0 saves only at the end.
        every_minutes: also save when that much time has passed since the last one; 0 is never.
        keep: newest checkpoints to keep.
        initial: also export the untrained model to ``initial/`` of the run directory.
    """

    every: int = 500
    every_minutes: float = 0.0
    keep: int = 2
    initial: bool = False

    def __post_init__(self) -> None:
        check(
            (self.every >= 0, f"every must not be negative, got {self.every}"),
            (
                isfinite(self.every_minutes) and self.every_minutes >= 0,
                f"every_minutes must not be negative, got {self.every_minutes}",
            ),
            (self.keep >= 1, f"keep must be at least 1, got {self.keep}"),
        )


@node
class EvalConfig:
    """What to measure on examples that are not trained on.

    Attributes:
        every: steps between evaluations; 0 evaluates before and after training only. Needs one of
            the next two, unless the data is embedded.
        data: held-out data; None takes ``fraction`` of the training examples instead (for
            embedded data: its own held-out split).
        fraction: share of the training examples set aside.
        max_rows: rows that the held-out loss is measured on.
        questions: held-out questions for exact match (embedded data only); 0 turns it off.
    """

    every: int = 0
    data: DataConfig | None = None
    fraction: float = 0.0
    max_rows: int = 256
    questions: int = 0

    def __post_init__(self) -> None:
        check(
            (self.every >= 0, f"every must not be negative, got {self.every}"),
            (0 <= self.fraction < 1, f"fraction must be in [0, 1), got {self.fraction}"),
            (self.data is None or self.fraction == 0, "set data or fraction, not both"),
            (self.max_rows >= 1, f"max_rows must be at least 1, got {self.max_rows}"),
            (self.questions >= 0, f"questions must not be negative, got {self.questions}"),
        )


@node
class LoggingConfig:
    """What to show and store; ``metrics.jsonl`` is always written.

    Attributes:
        every: steps between lines of ``metrics.jsonl`` and updates of the live table.
        plot: write ``loss.png`` and ``report.html`` when matplotlib is installed.
        tensorboard: write event files to ``tensorboard/`` of the run directory.
        wandb: project at Weights & Biases (``WANDB_MODE=offline`` works too).
        mlflow: experiment at the MLflow server (or folder) that ``MLFLOW_TRACKING_URI`` names.
        profile_steps: first and last step to record; traces go to ``profile/``.
    """

    every: int = 1
    plot: bool = True
    tensorboard: bool = False
    wandb: str | None = None
    mlflow: str | None = None
    profile_steps: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        first, last = self.profile_steps or (1, 1)
        check(
            (self.every >= 1, f"every must be at least 1, got {self.every}"),
            (
                1 <= first <= last,
                f"profile_steps must be the first and the last step, got {self.profile_steps}",
            ),
        )


@node
class LongConfig:
    """The concluding phase of a run on longer rows: at one step ``seq_len`` and the base of RoPE
    change, while optimizer state, schedule and step count go on (Qwen2 report, section 3.2).

    Attributes:
        fraction: share of ``train.steps``, at the end of the run.
        seq_len: tokens per row.
        rope_theta: base of RoPE.
        max_position_embeddings: context of the finished model; None keeps the model's, raised to
            ``seq_len`` if that is less.
        batch_rows: rows per step; None takes as many tokens per step as before.
        micro_batch_rows: rows per forward pass; None takes as many tokens as before, at least one
            row.
        data: other data for this phase; None starts a new pass over that of the run.
        parallel: other degrees for this phase, e.g. more ``cp``; None keeps those of the run.
        recompute: as in ``train``; None keeps that of the run.
    """

    fraction: float
    seq_len: int
    rope_theta: float
    max_position_embeddings: int | None = None
    batch_rows: int | None = None
    micro_batch_rows: int | None = None
    data: DataConfig | None = None
    parallel: ParallelConfig | None = None
    recompute: Literal["none", "selective", "full"] | None = None

    def __post_init__(self) -> None:
        check(
            (0 < self.fraction < 1, f"fraction must be between 0 and 1, got {self.fraction}"),
            (self.seq_len >= 2, f"seq_len must be at least 2, got {self.seq_len}"),
            (
                isfinite(self.rope_theta) and self.rope_theta > 0,
                f"rope_theta must be positive, got {self.rope_theta}",
            ),
            *(
                (value is None or value >= 1, f"{name} must be at least 1, got {value}")
                for name in ("max_position_embeddings", "batch_rows", "micro_batch_rows")
                for value in (getattr(self, name),)
            ),
        )


@node
class RunConfig:
    """A training run.

    Attributes:
        name: first part of the run directory's name.
        task: ``pretrain`` predicts every token of documents; ``sft`` predicts the assistant's
            tokens of conversations.
        seq_len: tokens per row.
        packing: fill rows with several documents that do not see each other.
        too_long: what to do with a conversation longer than ``seq_len``: ``refuse`` or
            ``truncate`` its end (documents are always split).
        backend: who trains: a backend's name or ``auto``.
        device, dtype, cpu_threads: as in `ExecutionPlan`.
        export_dtype: dtype of the exported weights.
        output_dir: parent of run directories.
        parallel: how the work is spread over processes.
        adapter: train LoRA adapters of a checkpoint instead of its weights.
        long: a concluding phase on longer rows.
    """

    name: str
    model: ModelConfig
    data: DataConfig
    task: Literal["pretrain", "sft"]
    seq_len: int
    train: TrainConfig
    packing: bool = True
    too_long: Literal["refuse", "truncate"] = "refuse"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    backend: str = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    cpu_threads: int | None = None
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    output_dir: str = "runs"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    adapter: AdapterConfig | None = None
    long: LongConfig | None = None

    def __post_init__(self) -> None:
        check(
            (self.seq_len >= 2, f"seq_len must be at least 2, got {self.seq_len}"),
            (
                self.cpu_threads is None or self.cpu_threads >= 1,
                f"cpu_threads must be at least 1, got {self.cpu_threads}",
            ),
            (
                bool(self.name) and not set(self.name) & set("/\\\0"),
                f"name must be usable as a directory name, got {self.name!r}",
            ),
            *check_data(
                self.data,
                task=self.task,
                epochs=self.train.epochs,
                held_out=self.eval.data,
                fraction=self.eval.fraction,
            ),
            (
                not self.eval.every or self._holds_out(),
                "eval.every has nothing to measure: set eval.fraction or eval.data, which give "
                "held-out data, or eval.every to 0",
            ),
            (
                self.eval.questions == 0 or isinstance(self.data, EmbeddedData),
                "eval.questions needs data.kind = embedded (other data has no short answers)",
            ),
            (
                not isinstance(self.data, EmbeddedData)
                or self.eval.questions <= self.data.held_out,
                "eval.questions must not exceed data.held_out",
            ),
            *self._adapter_rules(),
            (
                self.long is None or self.train.steps is not None,
                "a long phase is a share of train.steps: set them instead of train.epochs",
            ),
            (
                self.logging.profile_steps is None
                or self.train.steps is None
                or self.logging.profile_steps[0] <= self.train.steps,
                f"logging.profile_steps begins after the last step, {self.train.steps}",
            ),
            (
                self.train.spike.kind != "rewind"
                or bool(self.checkpoint.every or self.checkpoint.every_minutes),
                "train.spike.kind = rewind needs checkpoints to go back to: set checkpoint.every",
            ),
        )

    def _holds_out(self) -> bool:
        """Whether there is data that is not trained on; embedded data always brings some."""
        given = self.eval.data is not None or self.eval.fraction > 0
        return given or isinstance(self.data, EmbeddedData)

    def _adapter_rules(self) -> tuple[tuple[bool, str], ...]:
        """An adapter changes a checkpoint's matrices and can hold nothing else."""
        if self.adapter is None:
            return ()
        changed = ", ".join(f"model.{name}" for name in self.model.overrides())
        return (
            (self.model.checkpoint is not None, "adapter needs a model.checkpoint to adapt"),
            (not changed, f"an adapter cannot hold changes of the model: remove {changed}"),
            (self.long is None, "a long phase changes the model, not only an adapter: remove long"),
        )

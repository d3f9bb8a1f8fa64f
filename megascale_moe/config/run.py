"""The sections [train], [data] and [run]: how long and how, from what text, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from megascale_moe.config.declare import (
    Amount,
    Factor,
    NeededText,
    Sequences,
    SequencesOrZero,
    Steps,
    StepsOrZero,
    Text,
    TokensOrZero,
    key,
)
from megascale_moe.config.fields import Section


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """The training run. Batches count sequences; times are steps."""

    section: ClassVar = "train"
    # fmt: off

    steps: Steps = key(200, "Number of training steps (optimizer updates).", "max_steps", "train_iters", "train_steps")
    global_batch: Sequences = key(
        16, "Sequences of one step, over all ranks.", "global_batch_size", "train_batch_size", "batch_size"
    )
    micro_batch: SequencesOrZero = key(
        0, "Sequences of a data-parallel rank in one forward and backward pass; gradient accumulation sums over the "
        "passes of a step.", "micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu",
        "local_batch_size", "gradient_accumulation", "gradient_accumulation_steps",
        least="all sequences of the rank at once, or one through a pipeline",
    )
    dtype: Literal["fp32", "bf16"] = key(
        "fp32", "Format that weights and activations are computed in (mixed precision); gradients are summed and "
        "master weights kept in FP32.", "precision", "mixed_precision", "torch_dtype", "bf16",
    )
    optimizer: Literal["adamw", "muon"] = key(
        "adamw", "Optimizer, with its state sharded over data-parallel ranks (ZeRO-1).", "optim"
    )
    learning_rate: Amount = key(1e-3, "Learning rate after the warm-up.", "lr", "max_lr", "peak_lr")
    min_learning_rate: Amount = key(
        0.0, "Learning rate at the end of a cosine or warm-up-stable-decay schedule.", "min_lr", "lr_min"
    )
    lr_schedule: Literal["cosine", "wsd", "constant"] = key(
        "cosine", "Learning-rate schedule after the warm-up: cosine, warm-up-stable-decay (wsd), or constant.",
        "lr_scheduler_type", "lr_decay_style", "lr_scheduler",
    )
    warmup: StepsOrZero = key(
        20, "Steps over which the learning rate rises linearly from 0.", "warmup_steps", "lr_warmup_iters"
    )
    decay: StepsOrZero = key(
        0, "Steps of the final decay of a warm-up-stable-decay schedule.", "lr_wsd_decay_iters", "decay_steps",
        least="a fifth of the steps",
    )
    weight_decay: Amount = key(0.1, "Decoupled weight decay, of matrices only.", "wd")
    beta1: Annotated[float, Interval(ge=0, lt=1)] = key(
        0.9, "Decay rate of AdamW's first moment.", "adam_beta1", "betas"
    )
    beta2: Annotated[float, Interval(ge=0, lt=1)] = key(
        0.95, "Decay rate of AdamW's second moment.", "adam_beta2", "betas"
    )
    adam_eps: Factor = key(1e-8, "Epsilon in the denominator of AdamW.", "adam_epsilon", "eps")
    muon_momentum: Annotated[float, Interval(ge=0, lt=1)] = key(
        0.95, "Nesterov momentum of Muon.", "muon_beta", "momentum"
    )
    muon_scale: Literal["adamw_rms", "spectral"] = key(
        "adamw_rms", "Size of Muon's updates: that of AdamW's (0.2 times the root of the longer side), or the root of "
        "rows by columns, 1 at least.", "muon_scale_mode", "adjust_lr_fn",
    )
    muon_dtype: Literal["auto", "fp32", "bf16"] = key(
        "auto", "Dtype of Muon's Newton-Schulz steps; auto is BF16 on GPUs and FP32 on CPUs."
    )
    clip_norm: Amount = key(
        1.0, "Global norm that gradients are clipped to.", "max_grad_norm", "clip_grad", "gradient_clipping",
        "max_norm", least="no clipping",
    )
    seed: Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)] = key(
        0, "Seed of initial weights, of the order of the data and of sampling.", "random_seed"
    )
    eval_every: StepsOrZero = key(
        0, "Steps from one evaluation to the next.", "eval_steps", "eval_interval", least="only at the end"
    )
    eval_rows: SequencesOrZero = key(
        32, "Validation sequences of one evaluation.", "eval_iters", "max_eval_samples", least="no evaluation"
    )
    checkpoint_every: StepsOrZero = key(
        0, "Steps from one checkpoint to the next.", "save_steps", "save_interval", "checkpoint_interval",
        least="only at the end",
    )
    keep_checkpoints: StepsOrZero = key(
        2, "Newest checkpoints that are kept; older ones are deleted.", "save_total_limit", "keep_latest_k",
        least="all",
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "Device of the ranks; auto takes GPUs where there are enough.", "accelerator"
    )
    compile: Literal["auto", "on", "off"] = key(
        "auto", "Whether element-wise kernels are fused by torch.compile; auto does on GPUs and for 500 steps or more.",
        "torch_compile",
    )
    sample_tokens: TokensOrZero = key(
        64, "Tokens that the model generates at the end of the run.", "max_new_tokens", least="none"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where text comes from."""

    section: ClassVar = "data"
    # fmt: off

    path: NeededText = key(
        "stdlib", "Training text: a file, folder, glob, name of a dataset on the Hugging Face hub, or 'stdlib' for the "
        "source text of Python's standard library.", "data_path", "dataset", "dataset_name", "train_file", "train_data",
    )
    tokenizer: Text = key(
        "", "Path of a tokenizer.json.", "tokenizer_model", "tokenizer_name", "tokenizer_path", "tokenizer_file",
        least="a byte-level BPE is trained on the corpus",
    )
    text_field: NeededText = key(
        "text", "Field or column of the text in JSONL, Parquet and datasets.", "text_column", "json_keys",
        "dataset_text_field",
    )
    validation_fraction: Annotated[float, Interval(gt=0, lt=1)] = key(
        0.02, "Share of the tokens that is held out for evaluation.", "validation_split", "val_fraction", "test_size"
    )
    cache: Text = key(
        "", "Folder of the prepared (tokenized) corpora.", "cache_dir", "data_cache_path",
        least="~/.cache/megascale_moe",
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where results go."""

    section: ClassVar = "run"
    # fmt: off

    folder: NeededText = key(
        "runs/latest", "Run folder: metrics, checkpoints, traces and the report.", "output_dir", "save", "out_dir",
        "dump_folder",
    )
    resume: Text = key(
        "", "Checkpoint that the run continues from: a folder checkpoints/step-N, or 'auto' for the newest of the run "
        "folder.", "resume_from_checkpoint", "load", "load_checkpoint", least="a new run",
    )
    log_every: StepsOrZero = key(
        10, "Steps from one printed line to the next, where the output is no terminal.", "logging_steps",
        "log_interval", least="evaluations and the last step only",
    )
    trace_steps: StepsOrZero = key(
        0, "Number of last steps of which every operator is traced, into trace-rank-R.json.", "profile_steps"
    )

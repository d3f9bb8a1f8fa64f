"""The sections [train], [data] and [run]: how long and how, from what text, and where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval

from megascale_moe.config.declare import (
    Amount,
    Doc,
    Factor,
    NeededText,
    Sequences,
    SequencesOrZero,
    Special,
    Steps,
    StepsOrZero,
    Text,
    TokensOrZero,
)
from megascale_moe.config.fields import AS_DECLARED, Choices, checked


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training run. Batches count sequences; times are steps."""

    steps: Annotated[
        Steps, Doc("Number of training steps (optimizer updates).", ("max_steps", "train_iters", "train_steps"))
    ] = 200
    global_batch: Annotated[
        Sequences,
        Doc("Sequences of one step, over all ranks.", ("global_batch_size", "train_batch_size", "batch_size")),
    ] = 16
    micro_batch: Annotated[
        SequencesOrZero,
        Doc(
            "Sequences of a data-parallel rank in one forward and backward pass; gradient accumulation sums over the "
            "passes of a step.",
            (
                "micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu", "local_batch_size",
                "gradient_accumulation", "gradient_accumulation_steps",
            ),
        ),
        Special(0, "all sequences of the rank at once, or one through a pipeline"),
    ] = 0  # fmt: skip
    dtype: Annotated[
        Literal["fp32", "bf16"],
        Doc(
            "Format that weights and activations are computed in (mixed precision); gradients are summed and master "
            "weights kept in FP32.",
            ("precision", "mixed_precision", "torch_dtype", "bf16"),
        ),
    ] = "fp32"
    optimizer: Annotated[
        Literal["adamw", "muon"],
        Doc("Optimizer, with its state sharded over data-parallel ranks (ZeRO-1).", ("optim",)),
    ] = "adamw"
    learning_rate: Annotated[Amount, Doc("Learning rate after the warm-up.", ("lr", "max_lr", "peak_lr"))] = 1e-3
    min_learning_rate: Annotated[
        Amount, Doc("Learning rate at the end of a cosine or warm-up-stable-decay schedule.", ("min_lr", "lr_min"))
    ] = 0.0
    lr_schedule: Annotated[
        Literal["cosine", "wsd", "constant"],
        Doc(
            "Learning-rate schedule after the warm-up: cosine, warm-up-stable-decay (wsd), or constant.",
            ("lr_scheduler_type", "lr_decay_style", "lr_scheduler"),
        ),
    ] = "cosine"
    warmup: Annotated[
        StepsOrZero,
        Doc("Steps over which the learning rate rises linearly from 0.", ("warmup_steps", "lr_warmup_iters")),
    ] = 20
    decay: Annotated[
        StepsOrZero,
        Doc("Steps of the final decay of a warm-up-stable-decay schedule.", ("lr_wsd_decay_iters", "decay_steps")),
        Special(0, "a fifth of the steps"),
    ] = 0
    weight_decay: Annotated[Amount, Doc("Decoupled weight decay, of matrices only.", ("wd",))] = 0.1
    beta1: Annotated[
        float, Interval(ge=0, lt=1), Doc("Decay rate of AdamW's first moment.", ("adam_beta1", "betas"))
    ] = 0.9
    beta2: Annotated[
        float, Interval(ge=0, lt=1), Doc("Decay rate of AdamW's second moment.", ("adam_beta2", "betas"))
    ] = 0.95
    adam_eps: Annotated[Factor, Doc("Epsilon in the denominator of AdamW.", ("adam_epsilon", "eps"))] = 1e-8
    muon_momentum: Annotated[
        float, Interval(ge=0, lt=1), Doc("Nesterov momentum of Muon.", ("muon_beta", "momentum"))
    ] = 0.95
    muon_scale: Annotated[
        Literal["adamw_rms", "spectral"],
        Doc(
            "Size of Muon's updates: that of AdamW's (0.2 times the root of the longer side), or the root of rows by "
            "columns, 1 at least.",
            ("muon_scale_mode", "adjust_lr_fn"),
        ),
    ] = "adamw_rms"
    muon_dtype: Annotated[
        Literal["auto", "fp32", "bf16"],
        Doc("Dtype of Muon's Newton-Schulz steps; auto is BF16 on GPUs and FP32 on CPUs."),
    ] = "auto"
    clip_norm: Annotated[
        Amount,
        Doc(
            "Global norm that gradients are clipped to.",
            ("max_grad_norm", "clip_grad", "gradient_clipping", "max_norm"),
        ),
        Special(0.0, "no clipping"),
    ] = 1.0
    seed: Annotated[
        int,
        Interval(ge=-(2**63), le=2**63 - 1),
        Doc("Seed of initial weights, of the order of the data and of sampling.", ("random_seed",)),
    ] = 0
    eval_every: Annotated[
        StepsOrZero,
        Doc("Steps from one evaluation to the next.", ("eval_steps", "eval_interval")),
        Special(0, "only at the end"),
    ] = 0
    eval_rows: Annotated[
        SequencesOrZero,
        Doc("Validation sequences of one evaluation.", ("eval_iters", "max_eval_samples")),
        Special(0, "no evaluation"),
    ] = 32
    checkpoint_every: Annotated[
        StepsOrZero,
        Doc("Steps from one checkpoint to the next.", ("save_steps", "save_interval", "checkpoint_interval")),
        Special(0, "only at the end"),
    ] = 0
    keep_checkpoints: Annotated[
        StepsOrZero,
        Doc("Newest checkpoints that are kept; older ones are deleted.", ("save_total_limit", "keep_latest_k")),
        Special(0, "all"),
    ] = 2
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Doc("Device of the ranks; auto takes GPUs where there are enough.", ("accelerator",)),
    ] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"],
        Doc(
            "Whether element-wise kernels are fused by torch.compile; auto does on GPUs and for 500 steps or more.",
            ("torch_compile",),
        ),
    ] = "auto"
    sample_tokens: Annotated[
        TokensOrZero,
        Doc("Tokens that the model generates at the end of the run.", ("max_new_tokens",)),
        Special(0, "none"),
    ] = 64

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` for values outside their range."""
        checked("train", self, choices)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from."""

    path: Annotated[
        NeededText,
        Doc(
            "Training text: a file, folder, glob, name of a dataset on the Hugging Face hub, or 'stdlib' for the "
            "source text of Python's standard library.",
            ("data_path", "dataset", "dataset_name", "train_file", "train_data"),
        ),
    ] = "stdlib"
    tokenizer: Annotated[
        Text,
        Doc("Path of a tokenizer.json.", ("tokenizer_model", "tokenizer_name", "tokenizer_path", "tokenizer_file")),
        Special("", "a byte-level BPE is trained on the corpus"),
    ] = ""
    text_field: Annotated[
        NeededText,
        Doc(
            "Field or column of the text in JSONL, Parquet and datasets.",
            ("text_column", "json_keys", "dataset_text_field"),
        ),
    ] = "text"
    validation_fraction: Annotated[
        float,
        Interval(gt=0, lt=1),
        Doc("Share of the tokens that is held out for evaluation.", ("validation_split", "val_fraction", "test_size")),
    ] = 0.02
    cache: Annotated[
        Text,
        Doc("Folder of the prepared (tokenized) corpora.", ("cache_dir", "data_cache_path")),
        Special("", "~/.cache/megascale_moe"),
    ] = ""

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` for values outside their range."""
        checked("data", self, choices)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where results go."""

    folder: Annotated[
        NeededText,
        Doc(
            "Run folder: metrics, checkpoints, traces and the report.", ("output_dir", "save", "out_dir", "dump_folder")
        ),
    ] = "runs/latest"
    resume: Annotated[
        Text,
        Doc(
            "Checkpoint that the run continues from: a folder checkpoints/step-N, or 'auto' for the newest of the run "
            "folder.",
            ("resume_from_checkpoint", "load", "load_checkpoint"),
        ),
        Special("", "a new run"),
    ] = ""
    log_every: Annotated[
        StepsOrZero,
        Doc(
            "Steps from one printed line to the next, where the output is no terminal.",
            ("logging_steps", "log_interval"),
        ),
        Special(0, "evaluations and the last step only"),
    ] = 10
    trace_steps: Annotated[
        StepsOrZero,
        Doc("Number of last steps of which every operator is traced, into trace-rank-R.json.", ("profile_steps",)),
    ] = 0

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` for values outside their range."""
        checked("run", self, choices)

"""The sections [parallel], [overlap] and [wire]: which ranks share what, what hides, and what travels how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from megascale_moe.config.declare import Layers, Ranks, RanksOrZero, TextForm, key
from megascale_moe.config.fields import AS_DECLARED, Choices, Section, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """Which ranks share what. Ranks form a mesh pp x dp x cp x node; 0 means: work it out from the rank count."""

    section: ClassVar = "parallel"
    # fmt: off

    pp: Layers = key(
        1, "Pipeline-parallel size: ranks that the layers are spread over.", "pipeline_model_parallel_size",
        "pipeline_parallel_size", "pipeline_parallel_degree",
    )
    dp: RanksOrZero = key(
        0, "Data-parallel size: groups of a pipeline stage's ranks, each with its own sequences.", "data_parallel_size",
        "data_parallel_degree", least="all ranks / (pp x cp x node)",
    )
    cp: Ranks = key(
        1, "Context-parallel size: nodes that share every sequence; keys are gathered between them, whatever the "
        "attention inside of a node.", "context_parallel_size", "context_parallel_degree", "cp_size",
    )
    node: RanksOrZero = key(
        0, "Ranks that share a fast link, over which attention is sequence- or tensor-parallel.",
        "tensor_model_parallel_size", "tensor_parallel_degree", "gpus_per_node", "ulysses_degree", "nproc_per_node",
        least="ep x etp, or all ranks / (pp x dp x cp)",
    )
    attention: Literal["sp", "tp", "cp"] = key(
        "sp", "Parallelism of attention in a node: over the sequence with heads exchanged (sp, Ulysses), over heads "
        "(tp, tensor-parallel), or over the sequence with keys gathered (cp, context-parallel).",
    )
    ffn: Literal["ep", "tp", "ep+tp"] = key(
        "ep", "Parallelism of the experts: over their number (ep), over their width (tp), or both (ep+tp)."
    )
    ep: RanksOrZero = key(
        0, "Expert-parallel size: ranks that the experts are spread over.", "expert_model_parallel_size",
        "expert_parallel_size", "expert_parallel_degree", least="node / etp",
    )
    etp: Ranks = key(
        1, "Expert-tensor-parallel size: ranks that share the width of every expert; with ffn = 'tp' all of a node.",
        "expert_tensor_parallel_size", "expert_tensor_parallel_degree",
    )
    vocabulary: Literal["replicated", "sharded"] = key(
        "replicated", "Whether embedding, output head and loss are replicated, or sharded by vocabulary over a node.",
        "vocab_parallel", "loss_parallel",
    )
    dispatch: Literal["auto", "all_to_all", "all_gather"] = key(
        "auto",
        "How tokens reach their experts: all-to-all, all-gather and reduce-scatter, or the cheaper of them (auto).",
        "moe_token_dispatcher_type", "token_dispatcher",
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = key(
        "1f1b", "Schedule of the pipeline.", "pipeline_schedule", "pipeline_parallel_schedule"
    )
    virtual_stages: Layers = key(
        1, "Pipeline stages of each rank, more than one with schedule = 'interleaved'.",
        "virtual_pipeline_model_parallel_size", "num_virtual_stages_per_pipeline_rank", "num_model_chunks",
    )
    stage_layers: tuple[Layers, ...] = key(
        (), "Number of layers of each pipeline stage, in order.", "pipeline_model_parallel_layout",
        least="as even as possible",
    )
    # fmt: on

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` for sizes that no mesh has."""
        super().check(choices)
        several = self.schedule == "interleaved"
        require(
            several or self.virtual_stages == 1,
            f"parallel.virtual_stages = {self.virtual_stages} with parallel.schedule = {self.schedule!r}: "
            "use 1, or schedule = 'interleaved'",
        )
        require(
            not several or self.pp == 1 or self.virtual_stages > 1,
            "parallel.schedule = 'interleaved' needs parallel.virtual_stages of at least 2; with 1 use '1f1b'",
        )


@dataclass(frozen=True, kw_only=True)
class OverlapConfig(Section):
    """How communication hides behind computation."""

    section: ClassVar = "overlap"
    # fmt: off

    order: Literal["serial", "paper", "scheduled"] = key(
        "serial", "Order of operators, which decides how much communication is exposed: module by module (serial), by "
        "hand as in the paper, or by a list scheduler from measured times (scheduled).",
    )
    split: Annotated[str, TextForm(r"none|auto|[1-9][0-9]{0,6}", "'none', 'auto' or a number of pieces")] = key(
        "none", "Pieces that a communication and the product next to it are cut into, by peer, so that they overlap.",
        "tp_comm_overlap", "async_tensor_parallel",
    )
    remat: Literal["none", "paper", "full", "budget"] = key(
        "none", "What backward recomputes instead of keeping it: nothing, what the paper does, all inside of a layer "
        "(full), or as little as fits activation_bytes (budget).", "recompute", "recompute_granularity",
        "activation_checkpointing", "gradient_checkpointing",
    )
    activation_bytes: Annotated[int, Interval(ge=0, le=10**18)] = key(
        0, "Bytes of activations that a micro-batch may keep of a rank's layers, with remat = 'budget'.",
        "memory_budget",
    )
    micro_batches: Annotated[int, Interval(ge=1, le=2)] = key(
        1, "Micro-batches in work at once: with 2 the forward of one is woven into the backward of another.",
        "overlap_moe_expert_parallel_comm", "dual_batch_overlap",
    )
    # fmt: on

    @property
    def hides_synchronisation(self) -> bool:
        """Return whether reductions and gathers of weights are among the operators of a step, not behind them."""
        return self.order != "serial"

    @property
    def in_pairs(self) -> bool:
        """Return whether two micro-batches are worked on at once."""
        return self.micro_batches == 2

    def check(self, choices: Choices = AS_DECLARED) -> None:
        """Raise `ConfigError` for values outside their range."""
        super().check(choices)
        wanted = self.remat == "budget"
        require(
            (self.activation_bytes > 0) == wanted,
            f"overlap.activation_bytes = {self.activation_bytes} with overlap.remat = {self.remat!r}: "
            + ("give the bytes that may be kept" if wanted else "use remat = 'budget', or leave it 0"),
        )
        require(
            not self.in_pairs or self.order == "scheduled",
            f"overlap.micro_batches = 2 with overlap.order = {self.order!r}: use 'scheduled'",
        )


@dataclass(frozen=True, kw_only=True)
class WireConfig(Section):
    """The format of what travels: "fp32" is as it was computed, "auto" narrower where the link is the bottleneck.

    "bf16_ring", "fp8_cast" and "fp8_tensor" are what the paper rejects, to be compared with (docs/numerics.md).
    """

    section: ClassVar = "wire"
    # fmt: off

    gradients: Literal["fp32", "bf16", "fp8", "auto", "bf16_ring"] = key(
        "fp32", "Format in which gradients travel to be reduced; sums are in FP32.", "grad_reduce_in_fp32",
        "accumulate_allreduce_grads_in_fp32", "reduce_dtype", "gradient_compression",
    )
    activations: Literal["fp32", "bf16", "fp8", "auto", "fp8_cast", "fp8_tensor"] = key(
        "fp32", "Format in which activations and their gradients travel inside of a layer.", "fp8_dispatch"
    )
    parameters: Literal["fp32", "bf16", "fp8", "auto"] = key(
        "fp32", "Format in which updated weights are gathered from their ZeRO-1 shards.", "fp8_param_gather"
    )
    # fmt: on

    @property
    def gates_last(self) -> bool:
        """Return whether the gating weights come behind FC2, as in the paper's FP8 runs (its section 4.3)."""
        return self.activations not in ("fp32", "bf16")

"""Side `megascale*`: our own library, its trainer as `megascale train` runs it.

    --layout ep|dp|sp+ep|tp+tp   ep: experts split, everything else data parallel, as on the other sides; dp: all of it
                                 data parallel; else attention + FFN over one node of all ranks
    --order serial|scheduled     nothing hidden, or what the first three steps suggest ([overlap], split auto)
    --two                        two micro-batches at once, the forward of one woven into the backward of the other
    --gloo                       gloo's own collectives in place of our point-to-point exchange
    --eager                      without torch.compile of the fused kernels

The process groups and the batches are the benchmark's; everything else is what the loop of `megascale train` calls.
"""

import argparse

import torch
from torch import Tensor

from case import Case, forced_experts, forced_gates, read_weights
from gloo import use_gloo_collectives
from megascale_moe.comm.axis import connect, single
from megascale_moe.config import Config, ModelConfig, OverlapConfig, ParallelConfig, TrainConfig
from megascale_moe.data import Batch
from megascale_moe.huggingface.conversion import parameters_from_huggingface
from megascale_moe.strategies import routing
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.train.trainer import Trainer
from protocol import Job, Step, serve


def read_options(job: Job) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", choices=("ep", "dp", "sp+ep", "tp+tp"), default="ep")
    parser.add_argument("--order", choices=("serial", "scheduled"), default="serial")
    parser.add_argument("--two", action="store_true")
    parser.add_argument("--gloo", action="store_true")
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args(job.options)


def model_config(case: Case) -> ModelConfig:
    """The common case in our words; no auxiliary loss, as on the other sides."""
    return ModelConfig(
        layers=case.layers, hidden=case.hidden, heads=case.heads, kv_heads=case.kv_heads, experts=case.experts,
        top_k=case.top_k, ffn_hidden=case.expert_width, vocab=case.vocabulary, sequence_length=case.sequence,
        norm_eps=case.norm_eps, rope_theta=case.rope_theta,
    )  # fmt: skip


def train_config(case: Case, job: Job, eager: bool) -> TrainConfig:
    """The same optimizer for all."""
    return TrainConfig(
        global_batch=case.sequences, dtype="bf16" if job.bf16 else "fp32", learning_rate=case.learning_rate,
        lr_schedule="constant", warmup=0, weight_decay=case.weight_decay, beta1=case.betas[0], beta2=case.betas[1],
        adam_eps=case.eps, clip_norm=case.clip, device=job.device.type, compile="off" if eager else "on",
    )  # fmt: skip


def parallel_config(layout: str, ranks: int) -> ParallelConfig:
    """The layout in our words."""
    if layout in ("ep", "dp"):
        return ParallelConfig(node=1, ep=ranks if layout == "ep" else 1)
    attention, ffn = layout.split("+")
    return ParallelConfig(node=ranks, attention=attention, ffn=ffn)  # type: ignore[arg-type]


def overlap_config(order: str, micros: int) -> OverlapConfig:
    """Everything hidden that can be, or nothing."""
    if order == "serial":
        return OverlapConfig()
    return OverlapConfig(order="scheduled", split="auto", micro_batches=micros)


def force_experts(case: Case) -> None:
    """Let every router take the experts it is told to, at the gates of its own probabilities."""

    def route(logits: Tensor, bias: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, choice = logits.softmax(-1), forced_experts(len(logits), case)
        return forced_gates(probabilities, choice), choice, probabilities

    routing.route = route  # type: ignore[assignment]


def build(job: Job) -> Step:
    options = read_options(job)
    if options.gloo:
        use_gloo_collectives()
    if job.case.balanced:
        force_experts(job.case)
    micros = 2 if options.two else 1
    config = Config(
        model=model_config(job.case), train=train_config(job.case, job, options.eager),
        parallel=parallel_config(options.layout, job.ranks), overlap=overlap_config(options.order, micros),
    )  # fmt: skip
    mesh = mesh_of(config.parallel, config.model, job.ranks)
    trainer = Trainer(config, mesh, connect(mesh) if job.ranks > 1 else single(), job.device)
    trainer.set_weights(parameters_from_huggingface(read_weights(job.folder), config.model))

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        rows, length = inputs.shape
        ends = tuple(range(0, rows // micros * length + 1, length))
        parts = zip(inputs.chunk(micros), targets.chunk(micros), strict=True)
        result = trainer.step([Batch(*part, ends) for part in parts], job.case.tokens)
        return torch.tensor(result.loss)

    return step


if __name__ == "__main__":
    serve(build)

"""Side `megascale`: our own library, its trainer as `megascale train` runs it.

On two ranks the experts are split (EP 2) and everything else is data parallel, as on the other sides; with
`--layout=dp` the experts are data parallel too.
"""

import torch
from torch import Tensor

from case import CASE, Case, read_weights
from megascale_moe.comm.axis import connect, single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.train.data import Batch
from megascale_moe.train.huggingface import parameters_from_huggingface
from megascale_moe.train.trainer import Trainer
from protocol import Job, Step, serve


def model_config(case: Case) -> ModelConfig:
    """The common case in our words; no auxiliary loss, as on the other sides."""
    return ModelConfig(
        layers=case.layers, hidden=case.hidden, heads=case.heads, kv_heads=case.kv_heads, experts=case.experts,
        top_k=case.top_k, ffn_hidden=case.expert_width, vocab=case.vocabulary, sequence_length=case.sequence,
        norm_eps=case.norm_eps, rope_theta=case.rope_theta,
    )  # fmt: skip


def train_config(case: Case, job: Job) -> TrainConfig:
    """The same optimizer for all."""
    return TrainConfig(
        global_batch=case.sequences, dtype="bf16" if job.bf16 else "fp32", learning_rate=case.learning_rate,
        lr_schedule="constant", warmup=0, weight_decay=case.weight_decay, beta1=case.betas[0], beta2=case.betas[1],
        adam_eps=case.eps, clip_norm=case.clip, device="cpu", compile="off" if "--eager" in job.options else "on",
    )  # fmt: skip


def build(job: Job) -> Step:
    config = Config(model=model_config(CASE), train=train_config(CASE, job), parallel=ParallelConfig())
    mesh = Mesh(dp=job.ranks, ep=1 if "--layout=dp" in job.options else job.ranks)
    trainer = Trainer(config, mesh, connect(mesh) if job.ranks > 1 else single(), torch.device("cpu"))
    trainer.set_weights(parameters_from_huggingface(read_weights(job.folder), config.model))

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        rows, length = inputs.shape
        batch = Batch(inputs, targets, tuple(range(0, rows * length + 1, length)))
        result = trainer.step([batch], CASE.tokens)
        return torch.tensor(result.loss)

    return step


if __name__ == "__main__":
    serve(build)

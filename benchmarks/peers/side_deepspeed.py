"""Side `deepspeed-autoep`: DeepSpeed's engine with AutoEP over the Mixtral of transformers.

    --zero N    ZeRO stage; by default 0 in FP32 (the fastest) and 1 in BF16 (with 0 the loss lags by 0.6 %)

AutoEP replaces the experts of each layer by its own grouped ones, sharded over all ranks; the engine
does the gradient reduction, the clipping and the fused AdamW step, in BF16 with FP32 master weights.
"""

import argparse
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported

import deepspeed
import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM

from case import Case
from protocol import Job, Step, serve
from training import next_token_loss


def read_options(job: Job) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1 if job.bf16 else 0)
    return parser.parse_args(job.options)


def engine_config(job: Job, zero: int, case: Case) -> dict[str, object]:
    optimizer = {
        "lr": case.learning_rate,
        "betas": list(case.betas),
        "eps": case.eps,
        "torch_adam": True,
        "fused": True,
    }
    return {
        "train_micro_batch_size_per_gpu": case.sequences // job.ranks,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": case.clip,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": {"stage": zero},
        "bf16": {"enabled": job.bf16},
        "expert_parallel": {"enabled": True, "autoep_size": job.ranks, "preset_model": "mixtral"},
        "steps_per_print": 10**9,
    }


def parameter_groups(model: nn.Module, case: Case) -> list[dict[str, object]]:
    """Decay on matrices only. The engine splits off the expert groups itself."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": case.weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]


def build(job: Job) -> Step:
    options = read_options(job)
    model = MixtralForCausalLM.from_pretrained(job.folder, dtype=torch.float32, attn_implementation="sdpa").train()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, job.case),
        config=engine_config(job, options.zero, job.case),
        dist_init_required=False,
    )

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = next_token_loss(engine(input_ids=inputs, use_cache=False).logits, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)

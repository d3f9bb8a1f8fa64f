"""Side `transformers-*`: Mixtral of Hugging Face transformers with one of its experts implementations.

    --experts eager|grouped_mm|batched_mm    the implementation
    --layout ep|ddp|fsdp                     on several ranks: FSDP2 + expert parallel, or a reference
    --half autocast|master                   BF16 on one rank or under DDP: which form
    --keep                                   FSDP2 keeps gathered weights from forward to backward
    --compile                                torch.compile of each layer

Expert parallelism and FSDP2 are transformers' own (`from_pretrained(distributed_config=...)`), with
their BF16 policy (parameters BF16, reduction FP32, FP32 sharded weights and optimizer state).
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from case import Case, forced_experts, forced_gates
from protocol import Job, Step, serve
from training import Master, Plain, next_token_loss


def read_options(job: Job) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", default="grouped_mm")
    parser.add_argument("--layout", choices=("ep", "ddp", "fsdp"), default="ep")
    parser.add_argument("--half", choices=("autocast", "master"), default="master")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(job.options)


def sharding(job: Job, options: argparse.Namespace) -> dict[str, DistributedConfig]:
    """What from_pretrained needs to shard the model itself; nothing for one rank or DDP."""
    if job.ranks == 1 or options.layout == "ddp":
        return {}
    kept = ("model.embed_tokens", "model.layers.*")
    config = DistributedConfig(
        fsdp_size=job.ranks,
        fsdp_plan=dict.fromkeys(kept, "keep_full_weight") if options.keep else None,
        ep_size=job.ranks if options.layout == "ep" else 1,
        fsdp_mixed_precision=job.bf16,
    )
    return {"distributed_config": config}


def force_experts(case: Case) -> None:
    """Let every router take the experts it is told to, at the gates of its own probabilities."""

    def forward(self: MixtralTopKRouter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        choice = forced_experts(len(logits), case)
        return logits, forced_gates(logits.float().softmax(-1), choice), choice

    MixtralTopKRouter.forward = forward


def load(job: Job, options: argparse.Namespace) -> nn.Module:
    return MixtralForCausalLM.from_pretrained(
        job.folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=options.experts,
        **sharding(job, options),
    ).train()


def compile_layers(model: nn.Module) -> None:
    """Layer by layer; the token counts of experts may stay symbolic."""
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    for layer in model.model.layers:
        layer.compile()


def build(job: Job) -> Step:
    options = read_options(job)
    if job.case.balanced:
        force_experts(job.case)
    model = load(job, options).to(job.device)
    policy = bool(sharding(job, options))
    autocast = job.bf16 and not policy and options.half == "autocast"
    masters = job.bf16 and not policy and not autocast
    updater = Master(model, job.case) if masters else Plain(model, job.case)
    if options.compile:
        compile_layers(model)
    network = DistributedDataParallel(model) if job.ranks > 1 and not policy else model

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=autocast):
            logits = network(input_ids=inputs, use_cache=False).logits
        loss = next_token_loss(logits, targets)
        loss.backward()
        updater.update()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)

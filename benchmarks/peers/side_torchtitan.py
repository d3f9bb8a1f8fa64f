"""Side `torchtitan*`: its Qwen3 MoE decoder without the query/key norm, which is exactly Mixtral.

    --experts shipped|full       as shipped its experts compute in BF16 whatever the model does; `full`
                                 keeps the model's type, for a comparison of equal precision
    --half shard|master          BF16 on one rank: FSDP2's mixed precision on a mesh of one, or a BF16
                                 model with FP32 master weights
    --keep                       keep gathered weights from forward to backward (reshard_after_forward never)
    --compile                    torch.compile of each block, as its `compile.enable` does

Several ranks: its own FSDP2 + expert parallel (`parallelize_qwen3`), partial_dtensor backend.
"""

import argparse
from dataclasses import dataclass

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # before torchtitan looks for an accelerator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import GroupedExperts
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.models.qwen3.sharding import set_qwen3_sharding_config

from case import Case, read_weights
from protocol import Job, Step, serve
from training import Master, Plain, next_token_loss

BACKEND = "partial_dtensor"
LOADED = {"weight": skip_param_init}
LOADED_EXPERTS = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), skip_param_init)


class FullExperts(GroupedExperts):
    """Its grouped experts without the casts to BF16."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    @torch.compiler.disable  # under torch.compile grouped_mm is BF16 only
    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        gate, down, up = (local(weight).mT for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        offsets = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        hidden = nn.functional.silu(self._grouped_mm(A=x_RD, B_t=gate, offs=offsets))
        hidden = hidden * self._grouped_mm(A=x_RD, B_t=up, offs=offsets)
        return self._grouped_mm(A=hidden, B_t=down, offs=offsets)


def local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def read_options(job: Job) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", choices=("shipped", "full"), default="shipped")
    parser.add_argument("--half", choices=("shard", "master"), default="master")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(job.options)


def norm_config(width: int, case: Case) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=case.norm_eps, param_init=LOADED)


def attention_config(case: Case) -> object:
    return make_gqa_config(
        dim=case.hidden,
        n_heads=case.heads,
        n_kv_heads=case.kv_heads,
        head_dim=case.head_size,
        wqkv_param_init=LOADED,
        wo_param_init=LOADED,
        inner_attention=ScaledDotProductAttention.Config(),
        fuse_qkv=True,
        rope=CosSinRoPE.Config(dim=case.head_size, max_seq_len=case.sequence, theta=case.rope_theta),
    )


def moe_config(case: Case, full: bool) -> object:
    experts = make_routed_experts_config(
        dim=case.hidden,
        hidden_dim=case.expert_width,
        num_experts=case.experts,
        top_k=case.top_k,
        param_init=LOADED_EXPERTS,
        comm_backend="standard",
    )
    if full:
        fields = {"dim": case.hidden, "hidden_dim": case.expert_width, "num_experts": case.experts}
        experts.inner_experts = FullExperts.Config(**fields, param_init=LOADED_EXPERTS)
    router = make_router_config(
        dim=case.hidden,
        num_experts=case.experts,
        gate_param_init=LOADED,
        top_k=case.top_k,
        score_func="softmax",
        route_norm=True,
    )
    router._debug_force_load_balance = case.balanced  # its own option, the same experts as `forced_experts`
    return make_moe_config(num_experts=case.experts, router=router, routed_experts=experts, load_balance_coeff=None)


def model_config(case: Case, full: bool) -> Qwen3Model.Config:
    layers = [
        Qwen3TransformerBlock.Config(
            attention_norm=norm_config(case.hidden, case),
            ffn_norm=norm_config(case.hidden, case),
            attention=attention_config(case),
            moe=moe_config(case, full),
        )
        for _ in range(case.layers)
    ]
    sizes = {"num_embeddings": case.vocabulary, "embedding_dim": case.hidden}
    return Qwen3Model.Config(
        dim=case.hidden,
        vocab_size=case.vocabulary,
        norm=norm_config(case.hidden, case),
        tok_embeddings=Embedding.Config(**sizes, param_init=LOADED),
        lm_head=Linear.Config(in_features=case.hidden, out_features=case.vocabulary, param_init=LOADED),
        layers=layers,
    )


TRUNK_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attention.qkv_linear.wq.weight",
    "self_attn.k_proj.weight": "attention.qkv_linear.wk.weight",
    "self_attn.v_proj.weight": "attention.qkv_linear.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "block_sparse_moe.gate.weight": "moe.router.gate.weight",
}
EXPERT_NAMES = {"w1": "w1_EFD", "w2": "w2_EDF", "w3": "w3_EFD"}


def renamed(weights: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """The Mixtral checkpoint in torchtitan's names, experts stacked."""
    state = {new: weights[old] for old, new in TRUNK_NAMES.items()}
    for layer in range(case.layers):
        old_prefix, prefix = f"model.layers.{layer}", f"layers.{layer}"
        state |= {f"{prefix}.{new}": weights[f"{old_prefix}.{old}"] for old, new in LAYER_NAMES.items()}
        for old, new in EXPERT_NAMES.items():
            experts = [f"{old_prefix}.block_sparse_moe.experts.{e}.{old}.weight" for e in range(case.experts)]
            stacked = torch.stack([weights[name] for name in experts])
            state[f"{prefix}.moe.routed_experts.inner_experts.{new}"] = stacked
    return state


def load(job: Job, full: bool) -> Qwen3Model:
    """The whole model on this rank with the initial weights."""
    set_spmd_backend(BACKEND)
    config = model_config(job.case, full)
    set_qwen3_sharding_config(config, enable_sp=True, enable_ep=job.ranks > 1)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    model.load_state_dict(renamed(read_weights(job.folder), job.case))
    return model


def shard(model: Qwen3Model, job: Job, options: argparse.Namespace) -> None:
    """FSDP2 over all ranks, experts over the same ranks."""
    dims = ParallelDims(
        dp_replicate=1, dp_shard=job.ranks, cp=1, tp=1, pp=1, ep=job.ranks, world_size=job.ranks, spmd_backend=BACKEND
    )
    dims.build_mesh()
    parallelize_qwen3(
        model,
        parallel_dims=dims,
        training=TrainingConfig(mixed_precision_param="bfloat16" if job.bf16 else "float32"),
        parallelism=ParallelismConfig(
            expert_parallel_degree=job.ranks,
            spmd_backend=BACKEND,
            fsdp_reshard_after_forward="never" if options.keep else "default",
        ),
        compile_config=CompileConfig(enable=options.compile and options.experts == "shipped"),
        ac_config=None,
        dump_folder=str(job.folder),
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gloo has no PREMUL_SUM
            module.set_force_sum_reduction_for_comms(True)


def compile_blocks(model: Qwen3Model, broken: bool) -> None:
    """As torchtitan's apply_compile; its experts in FP32 break the graph."""
    torch._dynamo.config.capture_scalar_outputs = True
    for block in model.layers.values():
        block.compile(fullgraph=not broken)


def build(job: Job) -> Step:
    options = read_options(job)
    model = load(job, options.experts == "full")
    sharded = job.ranks > 1 or (job.bf16 and options.half == "shard")
    if sharded:
        shard(model, job, options)
    if options.compile and (not sharded or options.experts == "full"):
        compile_blocks(model, options.experts == "full")
    updater = Master(model, job.case) if job.bf16 and not sharded else Plain(model, job.case)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = next_token_loss(model(inputs), targets)
        (loss / job.ranks).backward()  # torchtitan sums gradients over ranks
        updater.update()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)

"""Side `megatron-*`: Megatron-Core's GPT model with MoE layers, its DDP, gradient finalisation and optimizer.

    --tp N          tensor parallelism of attention and vocabulary, with sequence parallelism from 2 on
    --ep N          expert parallelism
    --etp N         expert tensor parallelism
    --distributed   the distributed optimizer (ZeRO 1), with its overlap of the parameter gather

Local layer spec with two modules put in through the spec, as it provides for: torch's SDPA as core attention, since the
local one materialises all scores, and an RMSNorm, which is only in Transformer Engine. The gradient reduction overlaps
with backward, and in tensor-parallel layers input gathers and reduce-scatters with products, as they do on GPUs. The
dispatcher is all-gather for tensor-parallel experts and all-to-all else: what sends least.
"""

import argparse
import os

os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # asked for by its sequence parallelism

import megatron_on_cpu  # noqa: F401, I001 - before anything of megatron

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import router
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from case import Case, forced_experts, forced_gates, read_weights
from protocol import Job, Step, serve


class Attention(nn.Module):
    """Core attention by torch's SDPA: [sequence, batch, heads, size] to [sequence, batch, heads * size]."""

    def __init__(self, config: TransformerConfig, *_: object, **__: object) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class Norm(nn.RMSNorm):
    """torch's RMSNorm with the mark that lets gradients of sequence-parallel ranks be summed."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def read_options(job: Job) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("tp", "ep", "etp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--distributed", action="store_true")
    return parser.parse_args(job.options)


def model_config(case: Case, o: argparse.Namespace) -> TransformerConfig:
    """The common case in its words. Weights come from the checkpoint, so nothing is drawn for them."""
    return TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        num_query_groups=case.kv_heads,
        ffn_hidden_size=case.expert_width,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather" if o.etp > 1 else "alltoall",
        normalization="RMSNorm",
        layernorm_epsilon=case.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        init_method=lambda weight: weight,
        output_layer_init_method=lambda weight: weight,
        params_dtype=torch.float32,
        tensor_model_parallel_size=o.tp,
        expert_model_parallel_size=o.ep,
        expert_tensor_parallel_size=o.etp,
        sequence_parallel=o.tp > 1,
    )


def make_model(case: Case, config: TransformerConfig) -> GPTModel:
    layer = get_gpt_layer_local_spec(num_experts=case.experts, moe_grouped_gemm=False, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = Attention
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * case.layers, layer_norm=Norm),
        vocab_size=case.vocabulary,
        max_sequence_length=case.sequence,
        position_embedding_type="rope",
        rotary_base=case.rope_theta,
        share_embeddings_and_output_weights=False,
    )


def part(weight: Tensor, dim: int, group: torch.distributed.ProcessGroup) -> Tensor:
    """This rank's slice of a weight that a group shares."""
    return weight.chunk(group.size(), dim)[group.rank()]


def fused_qkv(weights: dict[str, Tensor], prefix: str, case: Case) -> Tensor:
    """Its order of rows: for each key head its query heads, the key and the value."""
    q, k, v = (weights[f"{prefix}.self_attn.{name}_proj.weight"].view(case.kv_heads, -1, case.hidden) for name in "qkv")
    return torch.cat((q, k, v), dim=1).flatten(0, 1)


def layer_state(weights: dict[str, Tensor], layer: int, case: Case) -> dict[str, Tensor]:
    """This rank's weights of a layer in its names."""
    old, tp, etp = f"model.layers.{layer}", parallel_state.get_tensor_model_parallel_group(), expert_group("tensor")
    state = {
        "input_layernorm.weight": weights[f"{old}.input_layernorm.weight"],
        "self_attention.linear_qkv.weight": part(fused_qkv(weights, old, case), 0, tp),
        "self_attention.linear_proj.weight": part(weights[f"{old}.self_attn.o_proj.weight"], 1, tp),
        "pre_mlp_layernorm.weight": weights[f"{old}.post_attention_layernorm.weight"],
        "mlp.router.weight": weights[f"{old}.block_sparse_moe.gate.weight"],
    }
    ep = expert_group("model")
    mine = torch.arange(case.experts).chunk(ep.size())[ep.rank()].tolist()
    for place, expert in enumerate(mine):
        w1, w2, w3 = (weights[f"{old}.block_sparse_moe.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
        prefix = f"mlp.experts.local_experts.{place}"
        state[f"{prefix}.linear_fc1.weight"] = torch.cat((part(w1, 0, etp), part(w3, 0, etp)))
        state[f"{prefix}.linear_fc2.weight"] = part(w2, 1, etp)
    return state


def expert_group(kind: str) -> torch.distributed.ProcessGroup:
    return getattr(parallel_state, f"get_expert_{kind}_parallel_group")()


def load_weights(model: GPTModel, weights: dict[str, Tensor], case: Case) -> None:
    """The Mixtral checkpoint, sliced as this rank needs it."""
    tp = parallel_state.get_tensor_model_parallel_group()
    state = {
        "embedding.word_embeddings.weight": part(weights["model.embed_tokens.weight"], 0, tp),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": part(weights["lm_head.weight"], 0, tp),
    }
    for layer in range(case.layers):
        state |= {f"decoder.layers.{layer}.{k}": v for k, v in layer_state(weights, layer, case).items()}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == state.keys(), parameters.keys() ^ state.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == state[name].shape, name
            parameter.copy_(state[name])


def make_optimizer(model: DistributedDataParallel, case: Case, distributed: bool) -> MegatronOptimizer:
    """Its AdamW and clipping. The decay of a group is what its scheduler, which we leave out, would set."""
    config = OptimizerConfig(
        lr=case.learning_rate,
        min_lr=case.learning_rate,
        weight_decay=case.weight_decay,
        adam_beta1=case.betas[0],
        adam_beta2=case.betas[1],
        adam_eps=case.eps,
        clip_grad=case.clip,
        use_distributed_optimizer=distributed,
        overlap_param_gather=distributed,
    )
    optimizer = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = case.weight_decay * group["wd_mult"]
    return optimizer


def force_experts(job: Job) -> None:
    """Let every router take the experts it is told to; tokens lie sequence by batch here."""
    case, rows = job.case, len(job.sequences)

    def route(logits: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        probabilities, choice = logits.softmax(-1), forced_experts(len(logits), case, rows)
        gates = forced_gates(probabilities, choice)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, choice, True)
        return torch.zeros_like(logits).scatter(1, choice, gates), chosen

    router.topk_routing_with_score_function = route


def build(job: Job) -> Step:
    options, case = read_options(job), job.case
    parallel_state.initialize_model_parallel(
        options.tp, expert_model_parallel_size=options.ep, expert_tensor_parallel_size=options.etp
    )
    if case.balanced:
        force_experts(job)
    config = model_config(case, options)
    network = make_model(case, config)
    load_weights(network, read_weights(job.folder), case)
    wrapping = DistributedDataParallelConfig(
        overlap_grad_reduce=True,
        overlap_param_gather=options.distributed,
        use_distributed_optimizer=options.distributed,
    )
    model = DistributedDataParallel(config, wrapping, network)
    optimizer = make_optimizer(model, case, options.distributed)
    positions = torch.arange(case.sequence)[None]

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = model(inputs, positions, None, labels=targets).mean()
        loss.backward()
        finalize_model_grads([model])
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)

"""The common case that every side trains: its size, initial weights, token batches and, if forced, routing.

Weights are written once per run as a Mixtral checkpoint in Hugging Face naming and the tokens beside
them, so all sides start from the same numbers and see the same batches: their losses have to agree.
The sizes are those of case.json, which every side reads from the same folder.

    python case.py FOLDER [--case cpu|gpu] [--steps N] [--seed S]
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and hyper-parameters; the same for every side.

    `balanced` forces the experts of a token by its position (`forced_experts`) instead of the router's choice.
    """

    layers: int = 4
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 2
    experts: int = 8
    top_k: int = 2
    expert_width: int = 512
    vocabulary: int = 4096
    sequence: int = 512
    sequences: int = 8
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    balanced: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def tokens(self) -> int:
        return self.sequence * self.sequences

    def mixtral_config(self) -> dict[str, object]:
        """config.json of the checkpoint; the auxiliary loss is off (no router logits are returned)."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.expert_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": self.sequence,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "output_router_logits": False,
            "tie_word_embeddings": False,
            "use_cache": False,
            "torch_dtype": "float32",
        }


CASES = {
    "cpu": Case(),
    "gpu": Case(
        hidden=2048, heads=16, kv_heads=4, experts=16, expert_width=1408, vocabulary=8192, sequence=2048, sequences=4,
        learning_rate=3e-5,  # with ten times that losses rise at first, and roundings grow until no two sides agree
    ),
}
"""What run.py measures, by the device: on a GPU four layers of about a 3-billion-parameter model's width."""


def weight_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every weight of the checkpoint, in Mixtral naming."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (case.vocabulary, case.hidden)}
    for layer in range(case.layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(case).items()}
    shapes["model.norm.weight"] = (case.hidden,)
    shapes["lm_head.weight"] = (case.vocabulary, case.hidden)
    return shapes


def layer_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Weights of one layer, without its prefix."""
    kv_width = case.kv_heads * case.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (case.hidden,),
        "self_attn.q_proj.weight": (case.hidden, case.hidden),
        "self_attn.k_proj.weight": (kv_width, case.hidden),
        "self_attn.v_proj.weight": (kv_width, case.hidden),
        "self_attn.o_proj.weight": (case.hidden, case.hidden),
        "post_attention_layernorm.weight": (case.hidden,),
        "block_sparse_moe.gate.weight": (case.experts, case.hidden),
    }
    for expert in range(case.experts):
        prefix = f"block_sparse_moe.experts.{expert}"
        shapes[f"{prefix}.w1.weight"] = (case.expert_width, case.hidden)
        shapes[f"{prefix}.w2.weight"] = (case.hidden, case.expert_width)
        shapes[f"{prefix}.w3.weight"] = (case.expert_width, case.hidden)
    return shapes


def make_weights(case: Case, seed: int) -> dict[str, Tensor]:
    """Matrices normal with deviation 0.02, norms one."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=source) * 0.02
        for name, shape in weight_shapes(case).items()
    }


def make_tokens(case: Case, steps: int, seed: int, branches: int = 32) -> Tensor:
    """(steps, sequences, sequence + 1) tokens of a Markov chain with Zipf-like branches, so the loss falls.

    Each token has 32 successors, drawn once from a Zipf distribution over the vocabulary and followed
    with probability proportional to 1 / rank.
    """
    source = torch.Generator().manual_seed(seed)
    zipf = 1.0 / torch.arange(1, case.vocabulary + 1)
    successors = torch.multinomial(zipf.expand(case.vocabulary, -1), branches, generator=source)
    tokens = torch.empty(steps * case.sequences, case.sequence + 1, dtype=torch.int64)
    tokens[:, 0] = torch.multinomial(zipf, len(tokens), replacement=True, generator=source)
    for position in range(1, case.sequence + 1):
        branch = torch.multinomial(zipf[:branches], len(tokens), replacement=True, generator=source)
        tokens[:, position] = successors[tokens[:, position - 1], branch]
    return tokens.view(steps, case.sequences, -1)


def write(folder: Path, case: Case, steps: int, seed: int) -> None:
    """Write checkpoint and tokens below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(make_weights(case, seed), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case.mixtral_config(), indent=2))
    (folder / "case.json").write_text(json.dumps(asdict(case), indent=2))
    save_file({"tokens": make_tokens(case, steps, seed + 1)}, folder / "tokens.bin")


def read_case(folder: Path) -> Case:
    """The case that a run has chosen."""
    fields = json.loads((folder / "case.json").read_text())
    return Case(**fields | {"betas": tuple(fields["betas"])})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The initial weights, FP32, in Mixtral naming."""
    return load_file(folder / "model.safetensors")


def read_tokens(folder: Path) -> Tensor:
    """All token batches of the run."""
    return load_file(folder / "tokens.bin")["tokens"]


def forced_experts(tokens: int, case: Case, repeated: int = 1) -> Tensor:
    """int64 [tokens, top_k]: experts in turn by position, so that each gets equally many tokens of each rank.

    Without an auxiliary loss a router collapses within a few steps, and every rank waits for the one with the loaded
    expert. Tokens are in the order of their positions, `repeated` consecutive ones sharing one; where a rank has a
    slice of every sequence, its positions begin at a multiple of the period and need no offset.
    """
    positions = torch.arange(tokens).div(repeated, rounding_mode="floor")[:, None]
    return (positions * case.top_k + torch.arange(case.top_k)) % case.experts


def forced_gates(probabilities: Tensor, choice: Tensor) -> Tensor:
    """The router's probabilities of the forced experts, with sum one as Mixtral's: the router still learns."""
    gates = probabilities.gather(-1, choice)
    return gates / gates.sum(-1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--case", choices=CASES, default="cpu")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, CASES[options.case], options.steps, options.seed)


if __name__ == "__main__":
    main()

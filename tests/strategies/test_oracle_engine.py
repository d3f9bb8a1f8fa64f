"""The operator list against transformers: the same weights give the same logits, loss and gradients.

tests/model compares our plain modules with transformers and test_layouts.py the list with our modules; here the two
ends meet, so that no mistake can hide in what both halves share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import single
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig
from megascale_moe.engine.executor import Program
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import Transformer
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import local_inputs, model_ops
from megascale_moe.testing import run_ranks
from megascale_moe.tools.verify.batch import BatchRows
from tests.oracles import FAMILIES, Oracle, Result, batch, case, errors, oracle, worst
from tests.strategies import layouts
from tests.strategies.layouts import run_model

pytestmark = pytest.mark.bulky  # transformers

# float32 carries 6e-8 per operation; two layers with their backward chain some hundred dependent sums of up to 64
# terms, taken in another order by each side. The same bound, measured in the same way, as for the plain modules.
TOLERANCE = 1e-5

ONE_RANK = [
    "mixtral", "mixtral-window", "mixtral-one-kv-head", "mixtral-k1", "mixtral-tied", "qwen3", "qwen3-unnormalised",
    "qwen3-dense-first", "qwen3-yarn", "olmoe", "olmoe-all-experts", "deepseek", "deepseek-direct-query",
    "deepseek-two-shared", "deepseek-yarn", "gpt-oss", "gpt-oss-three-layers", "gpt-oss-one-kv-head", "gpt-oss-k1",
    "gpt-oss-truncated-yarn",
]  # fmt: skip
SHAPES = [(3, 17), (1, 1), (1, 64)]  # nothing divides anything, a single token, one long row


def model_of(theirs: Oracle, length: int) -> Transformer:
    """Our model with their weights, for sequences of this length; their loss has no auxiliary part."""
    model = Transformer(replace(theirs.config, sequence_length=length, balance_loss=0.0, z_loss=0.0))
    model.load_state_dict(theirs.parameters)
    return model


def rows_of(tokens: Tensor, targets: Tensor) -> BatchRows:
    """Every row is one document."""
    return BatchRows(tokens, targets, ((0,),) * len(tokens))


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """From the list with the logits head, float32 [rows, length, vocab]."""
    rows, length = tokens.shape
    layout, segments = Layout(rows, length, single()), Segments.whole_rows(rows, length)
    program = Program(model_ops(model.config, layout, "logits"), ("tokens", "rope", "segments"), ["logits"])
    values = local_inputs(tokens, None, layout, segments, model.config)
    out: Tensor = program.run(values, dict(model.named_parameters()) | dict(model.named_buffers()))["logits"]
    return out.view(rows, length, -1)


def mean_result(results: list[layouts.Result], count: int, shown: Tensor) -> Result:
    """All ranks' sums as the mean over `count` targets, experts of all ranks put together."""
    gradients = {}
    for name, value in results[0].gradients.items():
        whole = torch.cat([result.gradients[name] for result in results]) if ".experts." in name else value
        gradients[name] = whole / (layouts.SCALE * count)
    loss = torch.tensor(sum(result.loss for result in results) / count)
    return Result(shown, loss, gradients)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", ONE_RANK)
def test_list_on_one_rank_equals_transformers(name: str, shape: tuple[int, int]) -> None:
    theirs = case(name)
    tokens, targets = batch(theirs.config, *shape)
    model = model_of(theirs, shape[1])
    found = run_model(model, rows_of(tokens, targets), Mesh(), "auto")
    ours = mean_result([found], targets.numel(), logits(model, tokens))
    tensor, error = worst(errors(ours, theirs.run(tokens, targets)))
    assert error < TOLERANCE, f"{tensor}: {error:.2e}"


EVEN: dict[str, dict[str, Any]] = {  # experts that two ranks can share
    "mixtral": {"num_local_experts": 6}, "qwen3_moe": {"num_experts": 6}, "olmoe": {"num_experts": 6},
    "deepseek_v3": {}, "gpt_oss": {"num_local_experts": 6},
}  # fmt: skip


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("family", FAMILIES)
def test_list_on_two_ranks_equals_transformers(family: str, dispatch: str) -> None:
    """Half of every sequence and half of the experts on each rank."""
    theirs = oracle(family, **EVEN[family])
    tokens, targets = batch(theirs.config, 3, 18)
    config, rows = model_of(theirs, 18).config, rows_of(tokens, targets)
    results = run_ranks(2, run_half, theirs.parameters, config, rows, dispatch)
    wanted = theirs.run(tokens, targets)
    ours = mean_result(results, targets.numel(), wanted.logits)  # logits are gathered nowhere: not compared here
    tensor, error = worst(errors(ours, wanted))
    assert error < TOLERANCE, f"{tensor}: {error:.2e}"


# attention, ffn, dispatch, pieces, node, ep, etp
GPT_OSS_LAYOUTS = [
    ("sp", "ep", "all_to_all", 1, 4, 4, 1), ("sp", "ep", "all_gather", 3, 4, 4, 1),
    ("tp", "ep", "all_to_all", 2, 2, 2, 1), ("tp", "tp", "auto", 1, 2, 1, 2), ("sp", "tp", "auto", 2, 2, 1, 2),
    ("sp", "ep+tp", "all_to_all", 2, 4, 2, 2), ("tp", "ep+tp", "all_gather", 1, 2, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("attention", "ffn", "dispatch", "pieces", "node", "ep", "etp"), GPT_OSS_LAYOUTS)
def test_gpt_oss_in_every_layout_equals_transformers(
    attention: str, ffn: str, dispatch: str, pieces: int, node: int, ep: int, etp: int
) -> None:
    """Sinks and biases included: one that every rank adds to its term of a sum would be there several times."""
    theirs = oracle("gpt_oss", num_local_experts=8)
    tokens, targets = batch(theirs.config, 3, 20)
    config, rows = model_of(theirs, 20).config, rows_of(tokens, targets)
    mesh = Mesh(node=node, ep=ep, etp=etp)
    more = {"attention": attention, "ffn": ffn, "pieces": pieces}
    results = run_ranks(node, run_layout, theirs.parameters, config, rows, mesh, dispatch, more)
    wanted = theirs.run(tokens, targets)
    gradients = {name: torch.zeros_like(value) for name, value in wanted.gradients.items()}
    for result in results:
        for name, placement in result.placements.items():
            for (offset, size), first, last in placement.ranges:
                place = tuple(slice(start, start + count) for start, count in zip(offset, size, strict=True))
                part = result.gradients[name].flatten()[first:last].view(size)
                gradients[name][place] = part / (layouts.SCALE * targets.numel())
    loss = torch.tensor(sum(result.loss for result in results) / targets.numel())
    tensor, error = worst(errors(Result(wanted.logits, loss, gradients), wanted))
    assert error < TOLERANCE, f"{tensor}: {error:.2e}"


def run_layout(
    parameters: dict[str, Tensor], config: ModelConfig, rows: BatchRows, mesh: Mesh, dispatch: str, more: dict[str, Any]
) -> layouts.Result:
    model = Transformer(config)
    model.load_state_dict(parameters)
    return run_model(model, rows, mesh, dispatch, **more)


def run_half(parameters: dict[str, Tensor], config: ModelConfig, rows: BatchRows, dispatch: str) -> layouts.Result:
    model = Transformer(config)
    model.load_state_dict(parameters)
    return run_model(model, rows, Mesh(node=2, ep=2), dispatch)

"""Context-parallel attention: any number of key heads, packed rows, equal work, and who else asks for a rank's tokens.

That layouts equal the plain model is in test_layouts.py, that passes leave it so in tests/pipeline, what travels in
test_wire_bytes.py; `megascale verify` runs it with every other strategy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megascale_moe.comm.axis import axes_of, connect
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig
from megascale_moe.engine.names import parse
from megascale_moe.engine.op import Op, Phase, Stream, Work
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import build
from megascale_moe.strategies.fit import mesh_of
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import local_inputs, model_ops
from megascale_moe.strategies.registry import slices_of
from megascale_moe.strategies.stages import Part
from megascale_moe.strategies.weights import placements
from megascale_moe.testing import run_ranks
from megascale_moe.tools.verify.batch import BatchRows, random_rows
from megascale_moe.train.trainer import Trainer
from tests.strategies.layouts import compare, reference, run_rank
from tests.strategies.test_layouts import GPT_OSS, LATENT, SMALL, TOLERANCE


@pytest.mark.parametrize("node", [2, 4])
@pytest.mark.parametrize("keys", [1, 3, 5])
def test_any_number_of_key_heads_fits(keys: int, node: int) -> None:
    """Neither ranks nor key heads divide the other; two query heads for each, values narrower than keys."""
    config = replace(SMALL, heads=2 * keys, kv_heads=keys, head_dim=8, v_head_dim=6, qk_norm="head")
    batch, mesh = random_rows(config, rows=2), Mesh(node=node, ep=node)
    results = run_ranks(node, partial(run_rank, attention="cp"), config, batch, mesh, "all_gather")
    loss, gradient, name = compare(results, reference(config, batch))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


@pytest.mark.parametrize("window", [0, 1, 6])
@pytest.mark.parametrize("config", [SMALL, LATENT], ids=["gqa", "mla"])
def test_packed_documents_of_any_length(config: ModelConfig, window: int) -> None:
    """Documents of one token, over the border of two chunks, over the chunks of three ranks, and of a whole row."""
    config = replace(config, sliding_window=window)
    plain = random_rows(config, rows=4)
    batch = BatchRows(plain.tokens, plain.targets, ((0, 1, 2, 15), (0, 3, 5), (0,), (0, 7, 8, 9)))
    run = partial(run_rank, attention="cp", vocabulary="sharded")
    results = run_ranks(4, run, config, batch, Mesh(node=4, ep=4), "all_to_all")
    loss, gradient, name = compare(results, reference(config, batch))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


def test_sequences_that_have_no_two_chunks_a_rank_are_refused() -> None:
    config = replace(SMALL, sequence_length=12)
    assert mesh_of(ParallelConfig(node=2, attention="cp"), config, 2).node == 2
    message = r"model\.sequence_length = 12 is not divisible by 2 x parallel\.node = 8; use one of 1, 2, 3, 4, 6, 12"
    with pytest.raises(ConfigError, match=message):
        mesh_of(ParallelConfig(node=4, attention="cp"), config, 4)
    assert mesh_of(ParallelConfig(node=1, attention="cp"), replace(config, sequence_length=13), 1).node == 1


# --- nodes that share sequences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "mesh", "strategies"),
    [
        (SMALL, Mesh(cp=4, ep=2), {"attention": "sp"}),
        (GPT_OSS, Mesh(cp=2, node=2, ep=2), {"attention": "sp", "pieces": 2}),
        (GPT_OSS, Mesh(cp=2, node=2, ep=4), {"attention": "cp", "vocabulary": "sharded"}),
        (replace(SMALL, heads=6, kv_heads=3, head_dim=8), Mesh(cp=2, node=2, ep=2), {"attention": "sp"}),
        (replace(LATENT, sliding_window=5), Mesh(cp=2, node=2, etp=2), {"attention": "tp", "ffn": "tp"}),
        (LATENT, Mesh(cp=2, node=2, ep=2), {"attention": "cp", "vocabulary": "sharded"}),
    ],
)
def test_packed_documents_over_nodes(config: ModelConfig, mesh: Mesh, strategies: dict[str, Any]) -> None:
    """Documents that begin and end anywhere in the shares of nodes, of one token, and of a whole row."""
    plain = random_rows(config, rows=4)
    batch = BatchRows(plain.tokens, plain.targets, ((0, 1, 2, 15), (0, 3, 5), (0,), (0, 7, 8, 9)))
    results = run_ranks(4, partial(run_rank, **strategies), config, batch, mesh, "all_to_all")
    loss, gradient, name = compare(results, reference(config, batch))
    assert loss < TOLERANCE
    assert gradient < TOLERANCE, name


@pytest.mark.parametrize("attention", ["sp", "tp", "cp"])
def test_weights_know_nothing_of_nodes_that_share_sequences(attention: str) -> None:
    """They lie as with sequences of their own: the same nodes are data-parallel then."""
    shared, apart = (
        placements(LATENT, Layout(1, 16, axes_of(mesh, 3), attention=attention), Part.whole(LATENT))
        for mesh in (Mesh(cp=2, node=2, ep=2), Mesh(dp=2, node=2, ep=2))
    )
    assert shared == apart


@pytest.mark.parametrize("attention", ["sp", "tp", "cp"])
@pytest.mark.parametrize(("nodes", "node"), [(2, 1), (2, 2), (4, 2)])
def test_nodes_have_the_same_part_of_the_causal_square(nodes: int, node: int, attention: str) -> None:
    """And so has every rank, of all heads or of its own of them: of one rank's FLOPs those are what is declared."""
    config = replace(SMALL, sequence_length=64, kv_heads=4)
    layout = Layout(2, 64, axes_of(Mesh(cp=nodes, node=node, ep=node), 1), attention=attention)
    work = [op for op in model_ops(config, layout) if op.cost.work == Work.ATTENTION]
    alone = [op for op in model_ops(config, Layout.alone(2, 64)) if op.cost.work == Work.ATTENTION]
    assert [op.cost.flops * nodes * node for op in work] == [op.cost.flops for op in alone]
    assert all(op.stream == Stream.INTER for op in model_ops(config, layout) if op.cost.axis == "cp")


# --- work ------------------------------------------------------------------------------------------------------------


def layout_of(config: ModelConfig, node: int, rank: int = 0, attention: str = "cp") -> Layout:
    """Two rows on a rank whose peers exist on paper only."""
    return Layout(2, config.sequence_length, axes_of(Mesh(node=node, ep=node), rank), attention=attention)


def scores(config: ModelConfig, node: int, rank: int) -> int:
    """Pairs of a query and a key that a rank works on, of one head."""
    layout = layout_of(config, node, rank)
    blocks = slices_of(layout).blocks(rank, Segments.whole_rows(2, config.sequence_length), config.sliding_window)
    found = 0
    for rows, queries, keys in blocks:
        count = queries.stop - queries.start
        seen = sum(keys.stop - keys.start - count + place + 1 for place in range(count))
        found += (rows.stop - rows.start) * seen
    return found


@pytest.mark.parametrize("node", [2, 4, 8])
def test_all_ranks_have_the_same_part_of_the_causal_square(node: int) -> None:
    config = replace(SMALL, sequence_length=64)
    assert {scores(config, node, rank) for rank in range(node)} == {2 * 64 * 65 // 2 // node}


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, sliding_window=6), LATENT], ids=["gqa", "window", "mla"])
def test_the_price_of_attention_is_a_ranks_share_of_it(config: ModelConfig) -> None:
    """1/n of one rank's, forward and backward; as with heads exchanged instead."""

    def flops(layout: Layout) -> list[float]:
        ops: list[Op] = [op for forward in model_ops(config, layout) for op in (forward, *forward.backward)]
        return [op.cost.flops for op in ops if op.cost.work == Work.ATTENTION]

    alone = flops(Layout.alone(2, config.sequence_length))
    assert flops(layout_of(config, 4)) == flops(layout_of(config, 4, attention="sp")) == [part / 4 for part in alone]


def test_there_is_one_message_each_way() -> None:
    for config, name in ((SMALL, "gather_keys"), (LATENT, "gather_latents")):
        ops = [op for forward in model_ops(config, layout_of(config, 4)) for op in (forward, *forward.backward)]
        sent = [op for op in ops if op.cost.wire_bytes and parse(op.name).layer == 1]
        names = [(parse(op.name).tensor, op.phase) for op in sent]
        assert names[: names.index(("gather_routing", Phase.F))] == [(name, Phase.F), (name, Phase.B)]


# --- what else asks for a rank's tokens ------------------------------------------------------------------------------


def next_logits(config: ModelConfig, vocabulary: str, mesh: Mesh, counts: list[int]) -> list[Tensor]:
    parallel = ParallelConfig(cp=mesh.cp, node=mesh.node, ep=mesh.ep, attention="cp", vocabulary=vocabulary)  # type: ignore[arg-type]
    train = TrainConfig(dtype="fp32", compile="off", global_batch=4)
    trainer = Trainer(Config(model=config, parallel=parallel, train=train), mesh, connect(mesh), torch.device("cpu"))
    trainer.set_weights(build(config).state_dict())
    return [trainer.next_token_logits(list(range(count))) for count in counts]


@pytest.mark.parametrize(
    ("vocabulary", "mesh"),
    [
        ("replicated", Mesh(node=4, ep=4)), ("sharded", Mesh(node=4, ep=4)), ("replicated", Mesh(cp=4, ep=2)),
        ("sharded", Mesh(cp=2, node=2, ep=2)),
    ],
)  # fmt: skip
def test_the_next_token_is_that_of_the_plain_model(vocabulary: str, mesh: Mesh) -> None:
    """The last token lies with each rank once, in its early and in its late chunk."""
    counts = [*range(1, 17, 2), 16]
    tokens = torch.arange(16)[None]
    wanted = build(SMALL)(tokens, Segments.whole_rows(1, 16)).detach().view(16, -1)
    for found in run_ranks(4, next_logits, SMALL, vocabulary, mesh, counts):
        for count, logits in zip(counts, found, strict=True):
            # FP32 sums in another order: a few 2^-24 of logits of size 1, grown through two layers.
            assert torch.allclose(logits, wanted[count - 1], rtol=1e-5, atol=1e-5)


def test_tables_and_tokens_are_those_of_the_ranks_chunks() -> None:
    layout = layout_of(SMALL, 4, rank=1)
    tokens = torch.arange(32).view(2, 16)
    values = local_inputs(tokens, tokens + 100, layout, Segments.whole_rows(2, 16), SMALL)
    chunks = [2, 3, 12, 13, 18, 19, 28, 29]
    assert values["tokens"].tolist() == chunks
    assert values["targets"].tolist() == [100 + token for token in chunks]
    whole = local_inputs(tokens, None, Layout.alone(2, 16), Segments.whole_rows(2, 16), SMALL)["rope"]
    assert all(torch.equal(part, table[chunks]) for part, table in zip(values["rope"], whole, strict=True))

"""The reference model: sizes against published numbers, documents, windows, losses, initial weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.model.attention import core, visible
from megascale_moe.model.counts import attention_flops_per_token, counts, parameter_shapes, parameter_weights
from megascale_moe.model.experts import DenseFFN, Experts
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import Transformer, build, initialise
from megascale_moe.model.weights import weights_of
from megascale_moe.presets import PRESETS

TINY = ModelConfig(
    layers=2, hidden=16, heads=4, kv_heads=2, experts=4, top_k=2, ffn_hidden=12, vocab=31, sequence_length=24,
    balance_loss=0.1, z_loss=0.01, init_std=0.3,
)  # fmt: skip
LATENT = replace(
    TINY, attention="mla", kv_heads=4, q_lora_rank=10, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
    rope_interleaved=True, score="sigmoid", expert_groups=2, correction_bias=True, shared_experts=1, dense_layers=1,
    dense_ffn_hidden=20,
)  # fmt: skip

# Float32 sums of some ten terms taken in another order, a hundred of them in a row.
ROUNDING = 2e-5


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, relative to the largest entry."""
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= ROUNDING * max(float(b.abs().max()), 1e-6)


# Published sizes in billions: total, active per token. Internal-352B's active number is not published.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.1),
    "hunyuan-large": (389.0, 52.0),
    "phi-3.5-moe": (41.9, 6.6),
    "deepseek-moe": (16.4, 2.8),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "olmoe-1b-7b": (6.9, 1.3),
    "deepseek-v3": (671.0, 37.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    total, active = PUBLISHED[name]
    found = counts(PRESETS[name])
    # Published to one digit after the point or to a billion, cut or rounded, and some leave the embedding out of the
    # active number: 2 % (0.9 B of DeepSeek-V3's 37 B) covers it for the active one, 0.2 % for the total.
    assert found.parameters_total / 1e9 == pytest.approx(total, rel=2e-3 if total > 10 else 5e-3)
    assert found.parameters_active / 1e9 == pytest.approx(active, rel=2e-2)


@pytest.mark.parametrize(("name", "total", "active"), [("gpt-oss-20b", 20.91, 3.61), ("gpt-oss-120b", 116.83, 5.13)])
def test_gpt_oss_has_the_sizes_of_its_model_card(name: str, total: float, active: float) -> None:
    """Billions to two digits; its active parameters leave out the embedding."""
    config, found = PRESETS[name], counts(PRESETS[name])
    assert round(found.parameters_total / 1e9, 2) == total
    assert round((found.parameters_active - config.vocab * config.hidden) / 1e9, 2) == active


def test_internal_352b_has_the_papers_size_and_flops() -> None:
    found = counts(PRESETS["paper-internal-352b"])
    assert round(found.parameters_total / 1e9, 1) == 351.9
    assert round(found.flops_per_token / 1e9, 1) == 282.5


@pytest.mark.parametrize("name", PRESETS)
def test_flops_follow_from_active_parameters(name: str) -> None:
    """6 FLOPs per active matrix entry, plus attention; norms and biases do not count, the look-up of an embedding is
    free.
    """
    config = PRESETS[name]
    found = counts(config)
    shapes = parameter_shapes(config).items()
    vectors = sum(shape[0] for _, shape in shapes if len(shape) == 1)
    if config.expert_bias:
        vectors += config.layers * config.top_k * (2 * config.ffn_hidden + config.hidden)
    lookup = 0 if config.tied_embeddings else config.vocab * config.hidden
    attention = 3 * config.layers * attention_flops_per_token(config)
    expected = 6 * (found.parameters_active - vectors - lookup) + attention
    # Active parameters are rounded to a whole number.
    assert found.flops_per_token == pytest.approx(expected, rel=1e-9, abs=6)


@pytest.mark.parametrize("window", [0, 3, 5])
def test_attention_flops_count_what_is_visible(window: int) -> None:
    config = replace(TINY, sliding_window=window, sequence_length=400)
    pairs = int(visible(Segments.whole_rows(1, 400), window).sum())
    exact = 2 * pairs / 400 * config.heads * (config.query_dim + config.value_dim)
    # The formula leaves out half a token of the diagonal: 0.5 of at least 2.99 visible ones.
    assert attention_flops_per_token(config) == pytest.approx(exact, rel=0.5 / 2.9)


def test_counts_are_those_of_the_built_model() -> None:
    for config in (TINY, LATENT, replace(TINY, tied_embeddings=True)):
        assert counts(config).parameters_total == sum(parameter.numel() for parameter in build(config).parameters())


# Packed rows


def packed() -> tuple[Tensor, Tensor, Segments]:
    """Two rows of 17 tokens with documents of 5, 1, 11 and 17 tokens."""
    tokens, targets = torch.randint(31, (2, 2, 17), generator=torch.Generator().manual_seed(3))
    return tokens, targets, Segments(2, 17, (0, 5, 6, 17, 34))


def losses_and_gradients(
    model: Transformer, pieces: list[tuple[Tensor, Tensor, Segments]]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sums over all pieces."""
    model.zero_grad()
    sums = torch.stack([torch.stack(model.losses(*piece)) for piece in pieces]).sum(0)
    sums.sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return sums[0].detach(), sums[1].detach(), gradients


def separate() -> list[tuple[Tensor, Tensor, Segments]]:
    """The same documents, one per batch."""
    tokens, targets, segments = packed()
    cuts = [(row, slice(first, last)) for row, first, last in segments.spans]
    return [
        (tokens[row, part][None], targets[row, part][None], Segments.whole_rows(1, part.stop - part.start))
        for row, part in cuts
    ]


@pytest.mark.parametrize("config", [TINY, LATENT, replace(TINY, sliding_window=3)], ids=["gqa", "mla", "window"])
def test_packed_row_equals_its_documents(config: ModelConfig) -> None:
    model = build(config)
    tokens, _, segments = packed()
    whole = model(tokens, segments).flatten(0, 1)
    parts = torch.cat([model(piece, piece_segments)[0] for piece, _, piece_segments in separate()])
    assert close(whole, parts)


@pytest.mark.parametrize(
    "config", [TINY, LATENT, replace(TINY, balance_granularity="device", device_groups=2)], ids=["gqa", "mla", "device"]
)
def test_losses_and_gradients_do_not_depend_on_the_packing(config: ModelConfig) -> None:
    model = build(config)
    loss, auxiliary, gradients = losses_and_gradients(model, [packed()])
    loss_apart, auxiliary_apart, gradients_apart = losses_and_gradients(model, separate())
    assert close(loss, loss_apart)
    assert close(auxiliary, auxiliary_apart)
    assert gradients.keys() == gradients_apart.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert close(gradient, gradients_apart[name]), name


def test_documents_in_another_order_have_the_same_auxiliary_loss() -> None:
    tokens, targets, segments = packed()
    model = build(TINY)
    swapped = Segments(2, 17, (0, 17, 22, 23, 34))
    assert close(
        model.losses(tokens.flip(0), targets.flip(0), swapped)[1], model.losses(tokens, targets, segments)[1]
    )


def test_boundaries_must_contain_rows_and_rise() -> None:
    with pytest.raises(ValueError, match="every multiple of 17 up to 34"):
        Segments(2, 17, (0, 5, 34))
    with pytest.raises(ValueError, match="rise strictly"):
        Segments(1, 4, (0, 3, 3, 4))


def test_documents_and_positions_of_tokens() -> None:
    segments = Segments(2, 6, (0, 2, 6, 11, 12))
    assert segments.positions().tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 0]
    assert segments.documents().tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3]


# What a token sees


@pytest.mark.parametrize("config", [TINY, LATENT], ids=["gqa", "mla"])
def test_no_token_sees_the_future_or_another_document(config: ModelConfig) -> None:
    model = build(config)
    tokens, _, segments = packed()
    before = model(tokens, segments)
    tokens[0, 8] = (tokens[0, 8] + 1) % 31
    changed = (model(tokens, segments) != before).any(-1).flatten()
    assert changed[:8].sum() == 0
    assert changed[8]
    assert changed[17:].sum() == 0


@pytest.mark.parametrize("window", [1, 4])
def test_sliding_window_is_that_many_tokens(window: int) -> None:
    """In one layer a changed token reaches itself and the window - 1 after it."""
    model = build(replace(TINY, layers=1, sliding_window=window))
    tokens = packed()[0][:1]
    before = model(tokens)
    tokens[0, 6] = (tokens[0, 6] + 1) % 31
    # Not bit by bit: who shares an expert with a token decides how its product is rounded.
    changed = ((model(tokens) - before).abs() > 1e-6).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(6, 6 + window))


def test_attention_core_is_softmax_of_scaled_scores() -> None:
    config = replace(TINY, v_head_dim=6)
    segments = Segments(1, 5, (0, 2, 5))
    q, k, v = (torch.randn(5, heads, width) for heads, width in ((4, 4), (2, 4), (2, 6)))
    out = core(q, k, v, segments, config, config.layer_specs[0]).view(5, 4, 6)
    first = {0: 0, 1: 0, 2: 2, 3: 2, 4: 2}
    for token in range(5):
        for head in range(4):
            past = slice(first[token], token + 1)
            weights = (k[past, head // 2] @ q[token, head] / 4**0.5).softmax(0)
            assert close(out[token, head], weights @ v[past, head // 2])


# Feed-forward and losses


def test_experts_are_the_weighted_sum_of_their_swiglus() -> None:
    config = TINY
    experts = Experts(config, config.layer_specs[0])
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x, gate = torch.randn(7, 16), torch.rand(7, 2)
    choice = torch.stack([torch.randperm(4)[:2] for _ in range(7)])
    kept = torch.rand(7, 2) < 0.7
    out = experts(x, choice, gate, kept)
    for token in range(7):
        expected = torch.zeros(16)
        for slot in range(2):
            w1, w3 = experts.w13[choice[token, slot]].chunk(2)
            hidden = F.silu(w1 @ x[token]) * (w3 @ x[token])
            expected += kept[token, slot] * gate[token, slot] * (experts.w2[choice[token, slot]] @ hidden)
        assert close(out[token], expected)


def test_shared_gate_scales_the_shared_expert() -> None:
    ffn = DenseFFN(16, 12, gated=True)
    x = torch.randn(3, 16)
    assert ffn.gate is not None
    gated = ffn(x)
    gate, ffn.gate = ffn.gate, None
    assert close(gated, ffn(x) * torch.sigmoid(gate(x)))


def test_ignored_targets_do_not_count() -> None:
    model = build(TINY)
    tokens, targets, segments = packed()
    full = model.losses(tokens, targets, segments)[0]
    first = model.losses(tokens, targets.masked_fill(torch.arange(17) >= 8, -100), segments)[0]
    second = model.losses(tokens, targets.masked_fill(torch.arange(17) < 8, -100), segments)[0]
    assert close(first + second, full)
    assert model.losses(tokens, torch.full_like(targets, -100), segments)[0] == 0


def test_auxiliary_loss_is_the_sum_of_both_kinds_over_all_layers() -> None:
    tokens, targets, segments = packed()

    def auxiliary(balance_loss: float, z_loss: float, layers: int = 2) -> Tensor:
        config = replace(TINY, balance_loss=balance_loss, z_loss=z_loss, layers=layers, init_std=0.0)
        return build(config).losses(tokens, targets, segments)[1]

    # With all weights zero the probabilities are 1 / 4 and every logsumexp is log 4; the load does not matter.
    assert close(auxiliary(0.1, 0.0), torch.tensor(2 * 34 * 0.1))
    assert close(auxiliary(0.0, 0.1), torch.tensor(2 * 34 * 0.1 * math.log(4) ** 2))
    assert close(auxiliary(0.1, 0.1), auxiliary(0.1, 0.0) + auxiliary(0.0, 0.1))
    assert close(auxiliary(0.1, 0.1, layers=1) * 2, auxiliary(0.1, 0.1))


def test_auxiliary_losses_are_off_by_default() -> None:
    tokens, targets, segments = packed()
    assert build(replace(TINY, balance_loss=0.0, z_loss=0.0)).losses(tokens, targets, segments)[1] == 0


def test_the_first_layers_are_dense_and_embeddings_tie() -> None:
    names = parameter_shapes(replace(LATENT, tied_embeddings=True))
    assert names["layers.0.ffn.w13.weight"] == (40, 16)
    assert "layers.0.ffn.router.weight" not in names
    assert "layers.1.ffn.router.weight" in names
    assert "head.weight" not in names


# Initial weights


def test_initial_weights_do_not_depend_on_which_experts_a_rank_creates() -> None:
    name, shape = "layers.1.ffn.experts.w13", (4, 24, 16)
    whole, weight = torch.empty(shape), parameter_weights(TINY)[name]
    initialise(name, whole, weight, TINY, seed=5)
    for first, last in ((0, 1), (1, 4), (2, 3)):
        part = torch.empty((last - first, *shape[1:]))
        initialise(name, part, weight, TINY, seed=5, first_expert=first)
        assert torch.equal(part, whole[first:last])
    assert not torch.equal(whole[0], whole[1])


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(1)
    first = build(TINY, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = build(TINY, seed=7).state_dict(), build(TINY, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert not torch.equal(first["layers.0.attention.qkv.weight"], first["layers.1.attention.qkv.weight"])
    assert torch.equal(build(replace(TINY, layers=1), seed=7).embedding.weight, first["embedding.weight"])


def test_initial_spread_and_norms() -> None:
    config = replace(TINY, hidden=128, ffn_hidden=64, init_std=0.05, layers=2)
    parameters = dict(build(config).named_parameters())
    for name, std in (
        ("embedding.weight", 0.05), ("layers.0.ffn.experts.w13", 0.05), ("layers.0.attention.qkv.weight", 0.05),
        ("layers.1.ffn.experts.w2", 0.025), ("layers.1.attention.out.weight", 0.025),
    ):  # fmt: skip
        # At least 31 x 128 samples: the estimate of a spread scatters by 1.1 %.
        assert float(parameters[name].detach().std()) == pytest.approx(std, rel=0.05)
    assert all(bool((value == 1).all()) for name, value in parameters.items() if name.endswith("norm.weight"))


def test_biases_start_at_zero_and_neither_decay_nor_count_as_products() -> None:
    """Biases of experts are a matrix of numbers, which were drawn, decayed and counted like one of a product."""
    biased = replace(TINY, attention_bias=True, attention_sinks=True, router_bias=True, expert_bias=True)
    weights, plain = parameter_weights(biased), parameter_weights(TINY)
    added = {name.split(".", 2)[2] for name in weights.keys() - plain.keys()}
    assert added == {
        "attention.qkv.bias", "attention.out.bias", "attention.sinks", "ffn.router.logits_bias", "ffn.experts.b13",
        "ffn.experts.b2",
    }  # fmt: skip
    parameters = dict(build(biased).named_parameters())
    for name in weights.keys() - plain.keys():
        assert not parameters[name].any()
        assert not weights[name].kind.decays
        assert not weights[name].matrices
    assert counts(biased).flops_per_token == counts(TINY).flops_per_token
    # (4 + 2 + 2) heads of width 4, hidden 16, 4 heads, 4 experts, of whose biases half are active.
    per_layer = {"qkv": 32, "out": 16, "sinks": 4, "router": 4, "experts": 2 * (24 + 16)}
    assert counts(biased).parameters_active - counts(TINY).parameters_active == 2 * sum(per_layer.values())


def test_what_nobody_declares_is_refused() -> None:
    layer = Experts(TINY, TINY.layer_specs[0])
    layer.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(KeyError, match="scale"):
        weights_of(layer)


def test_layers_attend_as_their_specs_say() -> None:
    config = replace(TINY, layers=3, sliding_window=5, full_attention_every=2)
    assert [spec.window for spec in config.layer_specs] == [5, 0, 5]
    assert config.kind_of_layer == (0, 1, 0)
    flops = [attention_flops_per_token(config, spec) for spec in config.layer_specs]
    assert attention_flops_per_token(config) == pytest.approx(sum(flops) / 3, rel=1e-12)  # sums in float64
    assert flops[0] < flops[1]


def test_fresh_correction_bias_is_zero() -> None:
    bias = build(LATENT).state_dict()["layers.1.ffn.router.bias"]
    assert bias.dtype == torch.float32
    assert not bias.any()

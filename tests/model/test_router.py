"""Routing: choice, weights, balance, capacity, each against numbers worked out by hand or by a plain loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from megascale_moe.config import ModelConfig
from megascale_moe.model.router import (
    Router,
    balance_sum,
    balance_weights,
    choose,
    route,
    updated_bias,
    within_capacity,
    z_sum,
)

Granularity = Literal["expert", "device"]
CONFIG = ModelConfig(experts=8, top_k=2, hidden=16)


def scores_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def random_logits(tokens: int, experts: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


# Choice


def test_best_experts_come_first() -> None:
    assert choose(scores_of([0.1, 0.4, 0.2, 0.3]), None, replace(CONFIG, experts=4)).tolist() == [[1, 3]]


def test_choice_is_limited_to_the_best_groups() -> None:
    """Groups (.9, .0), (.5, .6), (.4, .3), (.1, .2): by their best two they rank 1.1, .9, .7, .3."""
    scores = scores_of([0.9, 0.0, 0.5, 0.6, 0.4, 0.3, 0.1, 0.2])
    limited = replace(CONFIG, expert_groups=4, top_groups=1)
    assert choose(scores, None, limited).tolist() == [[3, 2]]
    assert choose(scores, None, replace(limited, group_score="max")).tolist() == [[0, 1]]
    assert choose(scores, None, replace(limited, top_groups=2, top_k=3)).tolist() == [[0, 3, 2]]
    assert choose(scores, None, replace(limited, top_groups=4, top_k=3)).tolist() == [[0, 3, 2]]


def test_negative_scores_in_a_chosen_group_win_over_the_other_groups() -> None:
    scores = scores_of([0.9, 0.1, 0.5, 0.4])
    bias = torch.tensor([0.5, -1.0, 0.0, 0.0])
    limited = replace(CONFIG, experts=4, expert_groups=2, top_groups=1, group_score="max")
    assert choose(scores, bias, limited).tolist() == [[0, 1]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_correction_bias_changes_the_choice_and_not_the_weights(score: Literal["softmax", "sigmoid"]) -> None:
    config = replace(CONFIG, score=score, correction_bias=True, norm_top_k=False)
    logits = random_logits(50)
    bias = torch.zeros(8)
    bias[5] = 10.0
    gate, choice, probabilities = route(logits, bias, config)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    assert (choice[:, 0] == 5).all()
    assert torch.equal(gate, scores.gather(1, choice))
    plain_gate, plain_choice, plain_probabilities = route(logits, torch.zeros(8), config)
    assert not torch.equal(choice, plain_choice)
    assert torch.equal(probabilities, plain_probabilities)
    assert torch.equal(plain_gate, scores.gather(1, plain_choice))


def test_weights_are_normalised_and_scaled() -> None:
    logits = random_logits(20)
    # Sums of eight float32 terms.
    for config in (CONFIG, replace(CONFIG, score="sigmoid")):
        gate, _, probabilities = route(logits, None, replace(config, routed_scaling=2.5))
        assert torch.allclose(gate.sum(-1), torch.full((20,), 2.5), rtol=1e-6)
        assert torch.allclose(probabilities.sum(-1), torch.ones(20), rtol=1e-6)
    assert (route(logits, None, replace(CONFIG, norm_top_k=False))[0].sum(-1) < 1).all()


def test_router_scores_in_float32_whatever_the_model_runs_in() -> None:
    router = Router(CONFIG, CONFIG.layer_specs[0])
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 16).bfloat16()
    gate, _, probabilities, logits = router.bfloat16()(x)
    assert {gate.dtype, probabilities.dtype, logits.dtype} == {torch.float32}
    assert torch.equal(logits, x.float() @ router.weight.float().T)


# Balance


def balanced_choice(tokens: int) -> Tensor:
    """Every expert is chosen equally often: token t takes 2 t and 2 t + 1, modulo 8."""
    first = 2 * torch.arange(tokens) % 8
    return torch.stack((first, first + 1), dim=1)


@pytest.mark.parametrize("granularity", ["expert", "device"])
def test_balanced_load_costs_one_per_token(granularity: Granularity) -> None:
    """Whatever the probabilities: each token's sum to one."""
    config = replace(CONFIG, balance_granularity=granularity, device_groups=2)
    documents = torch.zeros(12, dtype=torch.int64)
    weights = balance_weights(balanced_choice(12), documents, torch.tensor([12]), config)
    assert torch.equal(weights, torch.ones(1, 8))
    # Twelve sums of eight float32 terms.
    assert float(balance_sum(random_logits(12).softmax(-1), documents, weights)) == pytest.approx(12, rel=1e-6)


def test_one_expert_for_all_costs_experts_over_k_per_token() -> None:
    choice, documents = torch.tensor([[0, 1]] * 5), torch.zeros(5, dtype=torch.int64)
    probabilities = torch.zeros(5, 8)
    probabilities[:, 0] = 1.0
    weights = balance_weights(choice, documents, torch.tensor([5]), CONFIG)
    assert float(balance_sum(probabilities, documents, weights)) == 5 * 8 / 2


def plain_balance(choice: Tensor, probabilities: Tensor, spans: list[tuple[int, int]], groups: int) -> float:
    """The definition (DeepSeek-V2, section 2.2.3), document by document: tokens x sum over groups of f' P'."""
    experts, top_k = probabilities.shape[1], choice.shape[1]
    size, total = experts // groups, 0.0
    for first, last in spans:
        length = last - first
        for group in range(groups):
            members = range(group * size, (group + 1) * size)
            f = [experts / (top_k * length) * int((choice[first:last] == e).sum()) for e in members]
            p = [float(probabilities[first:last, e].mean()) for e in members]
            total += length * (sum(f) / size) * sum(p)
    return total


@pytest.mark.parametrize(("granularity", "groups"), [("expert", 8), ("device", 4), ("device", 2), ("device", 1)])
def test_balance_is_its_definition(granularity: Granularity, groups: int) -> None:
    config = replace(CONFIG, balance_granularity=granularity, device_groups=groups)
    _, choice, probabilities = route(random_logits(30), None, config)
    lengths = torch.tensor([7, 1, 22])
    documents = torch.repeat_interleave(torch.arange(3), lengths)
    weights = balance_weights(choice, documents, lengths, config)
    expected = plain_balance(choice, probabilities, [(0, 7), (7, 8), (8, 30)], groups)
    # 240 float32 terms against float64.
    assert float(balance_sum(probabilities, documents, weights)) == pytest.approx(expected, rel=1e-5)


def test_ranks_that_hold_parts_of_a_document_add_their_sums() -> None:
    _, choice, probabilities = route(random_logits(30), None, CONFIG)
    documents = torch.zeros(30, dtype=torch.int64)
    weights = balance_weights(choice, documents, torch.tensor([30]), CONFIG)
    parts = [balance_sum(probabilities[part], documents[part], weights) for part in (slice(0, 11), slice(11, 30))]
    # Two partial sums instead of one.
    assert float(sum(parts)) == pytest.approx(float(balance_sum(probabilities, documents, weights)), rel=1e-6)


def test_gradient_flows_through_probabilities_only() -> None:
    logits = random_logits(6).requires_grad_()
    _, choice, probabilities = route(logits, None, CONFIG)
    weights = balance_weights(choice, torch.zeros(6, dtype=torch.int64), torch.tensor([6]), CONFIG)
    assert not weights.requires_grad
    balance_sum(probabilities, torch.zeros(6, dtype=torch.int64), weights).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    crowded = weights[0] > 1
    # Pulled down on average where it is crowded: the step against the gradient lowers those logits.
    assert float(logits.grad[:, crowded].mean()) > 0 > float(logits.grad[:, ~crowded].mean())


def test_z_loss_is_the_squared_log_partition() -> None:
    logits = torch.log(torch.tensor([[1.0, 1.0], [2.0, 6.0]]))
    # Two logarithms in float32.
    assert float(z_sum(logits)) == pytest.approx(torch.log(torch.tensor(2.0)) ** 2 + torch.log(torch.tensor(8.0)) ** 2)


def test_bias_moves_towards_balance() -> None:
    bias = updated_bias(torch.zeros(4), torch.tensor([10, 2, 6, 6]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_bias_updates_balance_a_skewed_router() -> None:
    """The loop of DeepSeek-V3 at work: all tokens prefer two experts, after some hundred steps the load is even."""
    config = replace(CONFIG, score="sigmoid", correction_bias=True)
    logits = random_logits(400) + torch.tensor([3.0, 3.0, 0, 0, 0, 0, 0, 0])
    bias = torch.zeros(8)

    def load() -> Tensor:
        return torch.bincount(route(logits, bias, config)[1].flatten(), minlength=8) / 100

    assert load().max() > 3
    for _ in range(300):
        bias = updated_bias(bias, load(), rate=0.005)
    # A step of 0.005 moves about 0.005 x 400 tokens' worth of density across the threshold: some percent of the load.
    assert load().max() < 1.15
    assert load().min() > 0.85


# Capacity


def kept_by_plain_loop(choice: Tensor, gate: Tensor, rows: int, config: ModelConfig, capacity: int) -> Tensor:
    """Row by row and group by group: sort by gate, keep the first `capacity`."""
    kept = torch.zeros_like(choice, dtype=torch.bool)
    length, size = len(choice) // rows, config.experts // config.device_groups
    for row in range(rows):
        for group in range(config.device_groups):
            slots = [
                (-float(gate[token, slot]), token, slot)
                for token in range(row * length, (row + 1) * length)
                for slot in range(choice.shape[1])
                if int(choice[token, slot]) // size == group
            ]
            for _, token, slot in sorted(slots)[:capacity]:
                kept[token, slot] = True
    return kept


@pytest.mark.parametrize(("rows", "groups", "factor", "capacity"), [(1, 4, 1.0, 17), (2, 2, 0.8, 14), (1, 1, 0.5, 34)])
def test_dropping_keeps_the_highest_gates_and_at_most_the_capacity(
    rows: int, groups: int, factor: float, capacity: int
) -> None:
    config = replace(CONFIG, device_groups=groups, capacity_factor=factor)
    gate, choice, _ = route(random_logits(34), None, config)
    kept = within_capacity(choice, gate, rows, config)
    assert torch.equal(kept, kept_by_plain_loop(choice, gate, rows, config, capacity))
    assert 0 < int((~kept).sum()) < kept.numel()
    load = torch.bincount((choice // (8 // groups))[kept[:, :]].flatten(), minlength=groups)
    assert int(load.max()) <= rows * capacity


def test_ample_capacity_drops_nothing() -> None:
    config = replace(CONFIG, device_groups=4, capacity_factor=4.0)
    gate, choice, _ = route(random_logits(20), None, config)
    assert within_capacity(choice, gate, 1, config).all()


def test_earlier_tokens_win_ties() -> None:
    config = replace(CONFIG, experts=2, top_k=1, device_groups=2, capacity_factor=1.0)
    kept = within_capacity(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), 1, config)
    assert kept.flatten().tolist() == [True, True, False, True]


def test_a_row_is_dropped_alike_whatever_rows_are_beside_it() -> None:
    config = replace(CONFIG, device_groups=4, capacity_factor=0.9)
    gate, choice, _ = route(random_logits(40), None, config)
    together = within_capacity(choice, gate, 2, config)
    alone = [within_capacity(choice[part], gate[part], 1, config) for part in (slice(0, 20), slice(20, 40))]
    assert torch.equal(together, torch.cat(alone))

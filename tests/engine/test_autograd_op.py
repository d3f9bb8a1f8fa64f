"""Operators whose backward is autograd on the operator alone, against autograd of the plain function."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from megascale_moe.engine.autograd import autograd_op
from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.memory import Meter
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import backward


def mix(x: Tensor, y: Tensor, index: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two differentiable outputs and one that is not."""
    return (x * w).sin() + c, y[index] * x, index + 1


MIX = autograd_op(
    "mix", mix, reads=("x", "y", "index"), differentiable=("x", "y"), writes=("p", "q", "i"), weights=("w",),
    constants=("c",),
)  # fmt: skip


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(4), "y": torch.randn(4), "index": torch.tensor([3, 0, 1, 1])}


def run(seeds: dict[str, Tensor], values: dict[str, Tensor], sink: Gradient) -> dict[str, Tensor]:
    back = backward([MIX], seeds)
    program = Program([MIX, *back], [*values, *seeds], ["p", "q", "i", grad("x"), grad("y")])
    return program.run(values | seeds, {"w": torch.full((4,), 0.7), "c": torch.ones(4)}, {"w": sink})


def test_outputs_and_gradients_equal_autograd() -> None:
    values, sink = inputs(), Gradient(torch.empty(4))
    seeds = {grad("p"): torch.randn(4), grad("q"): torch.randn(4)}
    out = run(dict(seeds), dict(values), sink)
    x, y, w = (t.clone().requires_grad_() for t in (values["x"], values["y"], torch.full((4,), 0.7)))
    p, q, i = mix(x, y, values["index"], w, torch.ones(4))
    wanted = torch.autograd.grad([p, q], [x, y, w], list(seeds.values()))
    for name, value in (("p", p), ("q", q), ("i", i)):
        assert torch.equal(out[name], value)
        assert not out[name].requires_grad
    for found, expected in zip((out[grad("x")], out[grad("y")], sink.value()), wanted, strict=True):
        assert torch.equal(found, expected)  # the same program of torch


def test_input_without_part_in_what_has_a_gradient_gets_zeros() -> None:
    """The list has promised d:y to its reader; None would end in an addition."""
    sink = Gradient(torch.empty(4))
    out = run({grad("p"): torch.ones(4)}, inputs(), sink)
    assert out[grad("y")].tolist() == [0.0] * 4
    sink = Gradient(torch.empty(4))
    out = run({grad("q"): torch.ones(4)}, inputs(), sink)
    assert sink.value().tolist() == [0.0] * 4


def test_gradient_of_an_output_that_needs_none_is_ignored() -> None:
    """As the router's z-loss when its coefficient is zero: a constant, with a gradient all the same."""

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_zeros(())

    op = autograd_op("two", two, reads=("x",), differentiable=("x",), writes=("y", "z"))
    seeds = {grad("y"): torch.ones(3), grad("z"): torch.ones(())}
    program = Program([op, *backward([op], seeds)], ["x", *seeds], [grad("x")])
    assert program.run({"x": torch.ones(3), **seeds}, {})[grad("x")].tolist() == [2.0] * 3


def test_inputs_are_not_marked() -> None:
    values = inputs()
    run({grad("p"): torch.ones(4)}, values, Gradient(torch.empty(4)))
    assert not any(value.requires_grad for value in values.values())


def test_nothing_is_kept_but_what_the_list_names() -> None:
    """A graph kept since the forward held tensors that counted as nothing: twice what a policy promised to keep."""
    forward_writes = {name for op in [MIX] for name in op.writes}
    assert forward_writes == {"p", "q", "i"}
    values = inputs()
    meter = Meter()
    with meter:
        out = Program([MIX], list(values), ["p"]).run(dict(values), {"w": torch.ones(4), "c": torch.ones(4)})
        gc.collect()
    assert meter.alive == out["p"].nbytes

"""Lists of operators: what `check` refuses, and how `backward` strings the backward list together."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from megascale_moe.engine.executor import Program
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import Op, Phase, ProgramError, backward, check


def op(name: str, reads: str, writes: str, phase: Phase = Phase.F, back: tuple[Op, ...] = ()) -> Op:
    """An operator that does nothing; names separated by spaces."""
    return Op(
        name=name, reads=tuple(reads.split()), writes=tuple(writes.split()), run=lambda *_: None, phase=phase,
        backward=back,
    )  # fmt: skip


def scale(name: str, x: str, y: str, factor: float) -> Op:
    """y = factor * x with its backward."""
    back = Op(name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), run=lambda d: factor * d)
    return Op(name=name, reads=(x,), writes=(y,), run=lambda x: factor * x, backward=(back,))


def weighted(name: str, x: str, y: str, weight: str) -> Op:
    """y = x * weight, the input gradient (B) and the weight gradient (W) apart."""
    b = Op(
        name=name, phase=Phase.B, reads=(grad(y),), writes=(grad(x),), weights=(weight,), run=lambda d, w: d * w
    )  # fmt: skip
    w = Op(
        name=name, phase=Phase.W, reads=(x, grad(y)), writes=(), gradients=(weight,),
        run=lambda x, d, sink: sink.add(x * d),
    )  # fmt: skip
    return Op(name=name, reads=(x,), writes=(y,), weights=(weight,), run=lambda x, w: x * w, backward=(b, w))


def add(name: str, terms: tuple[str, ...], y: str) -> Op:
    """y = sum of terms."""
    back = Op(
        name=name, phase=Phase.B, reads=(grad(y),), writes=tuple(map(grad, terms)), run=lambda d: (d,) * len(terms)
    )
    return Op(name=name, reads=terms, writes=(y,), run=lambda *x: sum(x[1:], x[0]), backward=(back,))


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([op("late", "y", "z"), op("early", "x", "y")], "F late reads 'y', which nothing before it writes"),
        ([op("a", "x", "y"), op("b", "x", "y")], "F b writes 'y' a second time"),
        ([op("a", "x", "x")], "F a writes 'x' a second time"),
        ([op("a", "x", "y y")], "F a writes 'y' a second time"),
        ([op("a", "a", "a")], "F a reads 'a'"),  # its own result
        ([op("a", "x", "y"), op("a", "d:z", "d:y", Phase.B)], "B a reads 'd:z'"),
    ],
)
def test_check_names_the_operator_that_contradicts_the_list(ops: list[Op], message: str) -> None:
    with pytest.raises(ProgramError, match=re.escape(message)):
        check(ops, ["x"])
    with pytest.raises(ProgramError, match=re.escape(message)):
        Program(ops, ["x"])


def test_check_accepts_reads_of_nothing_and_several_readers() -> None:
    check([Op(name="a", reads=("", "x"), writes=("y", "z"), run=print), op("b", "x y y z", "")], ["x"])


def test_backward_is_the_reverse_with_phases_b_and_w() -> None:
    ops = [scale("first", "x", "h", 2.0), weighted("second", "h", "y", "w")]
    back = backward(ops, [grad("y")])
    assert [(b.phase, b.name) for b in back] == [(Phase.B, "second"), (Phase.W, "second"), (Phase.B, "first")]
    sink = Gradient(torch.empty(1))
    out = Program([*ops, *back], ["x", grad("y")], [grad("x")]).run(
        {"x": torch.tensor([3.0]), grad("y"): torch.tensor([5.0])}, {"w": torch.tensor([7.0])}, {"w": sink}
    )
    assert out[grad("x")].item() == 2 * 7 * 5
    assert sink.value().item() == 2 * 3 * 5


def test_operators_without_any_gradient_disappear() -> None:
    ops = [scale("metric", "x", "m", 2.0), scale("used", "x", "y", 3.0), scale("deeper", "m", "n", 2.0)]
    assert [b.name for b in backward(ops, [grad("y")])] == ["used"]
    assert backward(ops) == []


def test_missing_gradients_arrive_as_none() -> None:
    seen: list[object] = []

    def run(*gradients: Tensor | None) -> Tensor:
        seen.extend(gradients)
        return torch.ones(1)

    back = Op(name="two", phase=Phase.B, reads=(grad("y"), grad("m")), writes=(grad("x"),), run=run)
    two = Op(name="two", reads=("x",), writes=("y", "m"), run=lambda x: (x, x), backward=(back,))
    (only,) = backward([two], [grad("m")])
    assert only.reads == ("", grad("m"))
    Program([only], [grad("m")]).run({grad("m"): 4}, {})
    assert seen == [None, 4]


def test_operators_that_start_gradients_are_kept() -> None:
    """Such as a loss: its backward reads no gradient."""
    start = op("loss", "slope", "d:y", Phase.B)
    ops = [scale("a", "x", "y", 2.0), op("loss", "y", "loss slope", back=(start,))]
    assert [b.name for b in backward(ops)] == ["loss", "a"]


@pytest.mark.parametrize("uses", [2, 3, 5])
def test_gradients_of_a_shared_tensor_are_summed_by_one_operator(uses: int) -> None:
    ops = [scale("in", "x", "h", 1.0), *(scale(f"use{i}", "h", f"y{i}", 10.0**i) for i in range(uses))]
    ops.append(add("total", tuple(f"y{i}" for i in range(uses)), "y"))
    back = backward(ops, [grad("y")])
    sums = [b for b in back if b.name == "sum d:h"]
    assert [(b.phase, b.reads) for b in sums] == [(Phase.B, tuple(f"d:h#{i + 1}" for i in range(uses)))]
    assert [b.name for b in back[-2:]] == ["sum d:h", "in"]  # after the last part, before the first reader
    seed = torch.tensor([1.0])
    out = Program([*ops, *back], ["x", grad("y")], [grad("x")]).run({"x": seed, grad("y"): seed}, {})
    assert out[grad("x")].item() == sum(10.0**i for i in range(uses))
    assert seed.item() == 1.0  # operators never change what they read


def test_tensor_used_twice_by_one_operator_gets_both_gradients() -> None:
    """Its two parts had the same name, and the list was refused."""
    ops = [scale("in", "x", "h", 3.0), add("double", ("h", "h"), "y")]
    back = backward(ops, [grad("y")])
    assert [b.writes for b in back] == [("d:h#1", "d:h#2"), ("d:h",), ("d:x",)]
    out = Program(back, [grad("y")], [grad("x")]).run({grad("y"): torch.tensor([1.0])}, {})
    assert out[grad("x")].item() == 6.0


def test_backward_does_not_change_the_forward_list() -> None:
    ops = [scale("in", "x", "h", 1.0), scale("a", "h", "y", 2.0), scale("b", "h", "z", 2.0)]
    before = [(o.reads, o.writes, [b.writes for b in o.backward]) for o in ops]
    backward(ops, [grad("y"), grad("z")])
    assert before == [(o.reads, o.writes, [b.writes for b in o.backward]) for o in ops]

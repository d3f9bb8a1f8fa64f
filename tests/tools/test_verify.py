"""megascale verify: right layouts pass, a wrong operator is caught and named, results have the form that programs read.

The breakages are put into this process before the ranks are forked; each spoils one collective of one operator, as a
slip in a strategy would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megascale_moe.cli import main
from megascale_moe.comm import traffic
from megascale_moe.comm.axis import Axis, connect
from megascale_moe.comm.collectives import Pending, tag_of
from megascale_moe.config import Config, LayerSpec, ModelConfig
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import parse
from megascale_moe.kernels.grouped import Groups
from megascale_moe.optim import sync
from megascale_moe.optim.narrow_sums import FORMS
from megascale_moe.pipeline import step
from megascale_moe.presets import PRESETS
from megascale_moe.strategies import collective
from megascale_moe.testing import run_ranks
from megascale_moe.tools.verify import rank as ranks_of_layouts
from megascale_moe.tools.verify.explain import SINGLE, Comparison
from megascale_moe.tools.verify.layouts import Case, all_cases, case_of, covering, distinct, own_case, possible
from megascale_moe.tools.verify.rank import TOLERANCE, RankOfLayout
from megascale_moe.tools.verify.reference import Recorder, Reference, reference
from megascale_moe.tools.verify.scale import alike, scaled_down

MIXTRAL, QWEN, INTERNAL = (PRESETS[name] for name in ("mixtral-8x7b", "qwen3-30b-a3b", "internal-352b"))


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Verdict]:
    """Runs the command on a preset."""

    def run(preset: str, *options: str) -> Verdict:
        path = tmp_path / "config.toml"
        path.write_text(f'[model]\npreset = "{preset}"\n', encoding="utf-8")
        status = main(["verify", str(path), *options])
        out, err = capsys.readouterr()
        return Verdict(status, out, err)

    return run


@dataclass(frozen=True)
class Verdict:
    """What the command did."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output is exactly one JSON document."""
        return json.loads(self.out)  # type: ignore[no-any-return]


# --- right layouts ---------------------------------------------------------------------------------------------------


def run_all(cases: list[Case], references: dict[ModelConfig, Reference]) -> list[tuple[float, list[str], set[str]]]:
    """Per case: the worst error, tensors that differ, names that were not compared."""
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    found = []
    for case in cases:
        axes = connect(case.mesh, made=made)
        run = RankOfLayout(case, axes, dist.get_rank(), torch.device("cpu"), references[case.model])
        errors = run.verify()
        recorder = Recorder()
        run.step(recorder)
        comparison = Comparison(run, recorder.values)
        different = [found.text for found in comparison.differences() if found.error > SINGLE]
        names = {parse(name).tensor for name in comparison.skipped}
        found.append((errors.worst, different, names))
    return found


def some(cases: Iterable[Case]) -> list[Case]:
    """One case of each strategy, the last: those over several nodes and with pipelines; and with nodes that share
    sequences one of each attention, with experts on fewer ranks than a sequence if there is one.
    """
    found: dict[tuple[str, ...], Case] = {}
    for case in sorted(cases, key=lambda case: (case.mesh.node > 1, case.mesh.sequence > case.mesh.ffn)):
        found[case.strategy if case.mesh.cp == 1 else ("over nodes", case.parallel.attention)] = case
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (MIXTRAL, slice(0, None, 3)), (QWEN, slice(1, None, 3)), (INTERNAL, slice(2, None, 3)),
        (PRESETS["deepseek-v3"], slice(1, None, 2)),
    ],
)  # fmt: skip
def test_every_tensor_of_every_strategy_is_where_the_table_says(model: ModelConfig, part: slice) -> None:
    """No tensor differs, and those that are not compared are the few that mean nothing elsewhere.

    Every strategy with one of three models that have grouped heads, every second with latent attention.
    """
    cases = some(all_cases(Config(model=model), 4)[0])[part]
    references = {case.model: reference(case.model, 8) for case in cases}
    assert all(each.list_error < TOLERANCE and each.decided for each in references.values())
    for results in run_ranks(4, run_all, cases, references):
        for case, (error, different, names) in zip(cases, results, strict=True):
            assert error < TOLERANCE, case.words
            assert different == [], case.words
            assert names <= {"z", "auxiliary", "load", "head_part", "loss"}, case.words


def test_json_is_one_document_with_all_layouts(verify: Callable[..., Verdict]) -> None:
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--json")
    assert verdict.status == 0, verdict.err
    found = verdict.document
    assert found["passed"] is True
    assert found["first_difference"] is None
    assert found["own_layout"] == "verified first"
    assert [layout["own"] for layout in found["layouts"]].count(True) == 1
    for layout in found["layouts"]:
        assert layout["passed"] is True
        assert math.prod(layout["layout"][axis] for axis in ("pp", "dp", "cp", "node")) == 2
        assert 0 <= layout["loss_error"] < TOLERANCE
        assert 0 < layout["max_grad_error"] < TOLERANCE
        assert layout["worst_parameter"].endswith(("weight", "w13", "w2"))
        assert set(layout["gradient_errors"]) == {"embedding", "head", "norms", "router", "experts", "attention"}
    assert "all right" in verdict.err


@pytest.mark.parametrize("split", ["2", "auto"])
def test_the_configs_own_passes_are_verified(verify: Callable[..., Verdict], split: str) -> None:
    """A split that loses one peer's part is found, and only with the split: the plain list has no such operator."""
    passes = ["--overlap.order=paper", "--overlap.remat=paper", f"--overlap.split={split}"]
    layout = ["--parallel.node=2", "--parallel.dp=1", "--parallel.dispatch=all_gather", "--nproc=2", "--only"]
    right = verify("mixtral-8x7b", *layout, *passes)
    assert right.status == 0, right.err + right.out
    assert "with order 'paper'" in right.out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collective, "sum_in_order", lambda parts: parts[0])
        assert verify("mixtral-8x7b", *layout).status == 0
        wrong = verify("mixtral-8x7b", *layout, *passes, "--json")
    assert wrong.status == 1
    assert "sum_pieces" in json.dumps(wrong.document["first_difference"])


def test_table_and_summary_for_people(verify: Callable[..., Verdict]) -> None:
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--only")
    assert verdict.status == 0, verdict.err
    assert "ok (yours)" in verdict.out
    assert "all right: 1 of 1 layouts within 1e-05" in verdict.out


# --- wrong operators -------------------------------------------------------------------------------------------------

Collective = Callable[..., Pending]


def spoiled(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, tag: str, instead: Collective) -> None:
    """Replace a module's collective for one operator's messages; `instead(right, x, ..., axis, tag)`."""
    right = getattr(module, function)

    def either(*args: Any, **options: Any) -> Any:
        ours = any(isinstance(given, int) and given == tag_of(tag) for given in args)
        return instead(right, *args, **options) if ours else right(*args, **options)

    monkeypatch.setattr(module, function, either)


def drop_last(right: Collective, x: Tensor, axis: Axis, tag: int) -> Pending:
    """A reduce-scatter in which the last rank's part is lost."""
    return right(torch.zeros_like(x) if axis.index == axis.size - 1 else x, axis, tag)


def own_part(_: Collective, x: Tensor, axis: Axis, tag: int) -> Pending:
    """A slice where a sum over the ranks belongs."""
    return Pending([], lambda: x.chunk(axis.size)[axis.index].clone(), 0)


def swapped(right: Collective, send: Any, receive: Any, axis: Axis, tag: int) -> Pending:
    """The parts of the ranks in the wrong order."""
    return right(send, receive[::-1], axis, tag)


def rolled(right: Collective, send: Any, receive: Any, axis: Axis, tag: int) -> Pending:
    """The rows of each part shifted by one."""
    return right(send, receive, axis, tag).then(lambda parts: [part.copy_(part.roll(1, 0)) for part in parts])


def first_of_batch(right: Collective, x: Tensor, *args: Any, **options: Any) -> Pending:
    """Rows of a message in reverse."""
    return right(x.flip(0), *args, **options)


BREAKAGES = {
    "combine loses a rank": (
        collective, "reduce_scatter", "layers.1.combine_reduce_scatter", drop_last,
        "--parallel.node=4 --parallel.dispatch=all_gather", ("layers.1.combine_reduce_scatter", "F", 0, "ffn_out"),
    ),
    "heads swapped": (
        traffic, "exchange", "layers.0.gather_heads", swapped,
        "--parallel.node=4", ("layers.0.gather_heads", "F", 0, "attn_a2a"),
    ),
    "slice instead of a sum in backward": (
        collective, "reduce_scatter", "layers.0.dispatch_all_gather B", own_part,
        "--parallel.node=2 --parallel.ep=4 --parallel.dispatch=all_gather",
        ("layers.0.dispatch_all_gather", "B", 0, "d:ln2_out"),
    ),
    "tensor-parallel output": (
        collective, "reduce_scatter", "layers.1.scatter_tokens", drop_last,
        "--parallel.node=4 --parallel.attention=tp", ("layers.1.scatter_tokens", "F", 0, "attn_out"),
    ),
    "rows passed on wrongly": (
        traffic, "exchange", "layers.0.dispatch_etp_all_gather", rolled,
        "--parallel.node=4 --parallel.ffn=ep+tp --parallel.ep=2 --parallel.etp=2 --parallel.dispatch=all_to_all",
        ("layers.0.dispatch_etp_all_gather", "F", 0, "dispatch_all"),
    ),
    "message between stages": (
        step, "send", "F 0 1", first_of_batch, "--parallel.pp=2 --parallel.node=2",
        ("receive_hidden", "F", 2, "hidden_2"),
    ),
    "gradient between stages": (
        step, "send", "B 1 0", first_of_batch, "--parallel.pp=2 --parallel.node=2 --parallel.schedule=zero_bubble",
        ("receive_gradient", "B", 0, "d:hidden_2"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_first_wrong_operator_is_named(
    name: str, verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, tag, instead, options, expected = BREAKAGES[name]
    spoiled(monkeypatch, module, function, tag, instead)
    verdict = verify("mixtral-8x7b", "--nproc", "4", "--only", "--json", *options.split())
    assert verdict.status == 1, verdict.err
    first = verdict.document["first_difference"]
    assert (first["op"], first["phase"], first["rank"], first["tensor"]) == expected
    assert verdict.document["passed"] is False
    assert verdict.document["layouts"][0]["passed"] is False
    assert f"{expected[0]} (phase {expected[1]}, rank {expected[2]}" in verdict.err


def test_a_micro_batch_sent_in_place_of_another(
    verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, earlier = step.send, {}

    def late(x: Tensor, peer: int, axis: Axis, tag: int, *, backward: bool = False) -> Pending:
        if not backward:
            earlier[tag] = x
            x = earlier.get(tag_of("F 0 0"), x)
        return right(x, peer, axis, tag, backward=backward)

    monkeypatch.setattr(step, "send", late)
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--only", "--json", "--parallel.pp=2")
    first = verdict.document["first_difference"]
    assert verdict.status == 1
    assert (first["op"], first["micro_batch"], first["rank"]) == ("receive_hidden", 1, 1)


@pytest.mark.parametrize("level", ["intra", "inter"])
def test_a_reduction_that_is_skipped_in_the_optimizer(
    level: str, verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"gradients.replicated.{level}_reduce_scatter"
    form = SimpleNamespace(start=FORMS["fp32"].start)
    spoiled(monkeypatch, form, "start", f"{name} 1", own_part)
    monkeypatch.setitem(FORMS, "fp32", replace(FORMS["fp32"], start=form.start))
    verdict = verify("mixtral-8x7b", "--nproc", "4", "--only", "--json", "--parallel.node=2", "--parallel.dp=2")
    first = verdict.document["first_difference"]
    assert verdict.status == 1, verdict.err
    assert (first["op"], first["parameters"]) == (name, "group replicated")
    assert verdict.document["layouts"][0]["max_grad_error"] < TOLERANCE  # forward and backward are right


def test_weights_that_do_not_arrive_after_the_update(
    verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = sync.all_gather_in_place

    def lost(buffer: Tensor, axis: Axis, tag: int) -> Pending:
        if axis.name == "expert_data":
            return Pending([], lambda: buffer, 0)
        return right(buffer, axis, tag)

    monkeypatch.setattr(sync, "all_gather_in_place", lost)
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--only", "--json", "--parallel.node=1", "--parallel.dp=2")
    first = verdict.document["first_difference"]
    assert verdict.status == 1, verdict.err
    assert (first["op"], first["tensor"]) == ("parameters.experts.inter_all_gather", "weights")


def test_a_wrong_weight_gradient(verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is right then: what operators of phase W make goes into buffers."""
    right = Gradient.add_grouped_mm

    def doubled(self: Gradient, a: Tensor, b: Tensor, groups: Groups) -> None:
        right(self, 2 * a if dist.is_initialized() and dist.get_rank() == 1 else a, b, groups)

    monkeypatch.setattr(Gradient, "add_grouped_mm", doubled)
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--only", "--json")
    first = verdict.document["first_difference"]
    assert verdict.status == 1, verdict.err
    assert (first["op"], first["phase"], first["rank"]) == ("layers.1.fc2", "W", 1)
    assert first["parameters"] == "experts"


def test_an_operator_that_raises(verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(right: Collective, *args: Any) -> Pending:
        raise RuntimeError("no such thing")

    spoiled(monkeypatch, traffic, "exchange", "layers.0.scatter_heads", broken)
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--only", "--json")
    assert verdict.status == 1
    assert verdict.document["passed"] is False
    assert "layers.0.scatter_heads (phase F): RuntimeError: no such thing" in verdict.document["error"]
    assert "Traceback" not in verdict.err


def test_a_difference_of_one_layout_does_not_hide_the_others(
    verify: Callable[..., Verdict], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, collective, "reduce_scatter", "layers.0.dispatch_all_gather B", own_part)
    verdict = verify("mixtral-8x7b", "--nproc", "2", "--json")
    found = verdict.document["layouts"]
    wrong = [layout for layout in found if not layout["passed"]]
    assert verdict.status == 1
    assert 0 < len(wrong) < len(found)
    assert {layout["layout"]["dispatch"] for layout in wrong} == {"all_gather"}
    assert {layout["first_difference"]["op"] for layout in wrong} == {"layers.0.dispatch_all_gather"}


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--nproc 0", "argument --nproc: '0' is not a number of ranks"),
        ("--model.preset=mixtral", "{config}: model.preset = 'mixtral' is unknown"),
        ("--parallel.attention=up", "{config}: parallel.attention = 'up': must be one of"),
        ("--nproc 4 --only --parallel.node=3", "--only: the config's own layout does not fit 4 ranks: parallel.node"),
        ("--steps=3", "argument '--steps=3' is unknown"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    options: str, expected: str, verify: Callable[..., Verdict], tmp_path: Path
) -> None:
    verdict = verify("mixtral-8x7b", *options.split())
    assert verdict.status == 2
    assert verdict.out == ""
    assert verdict.err.count("\n") == 1
    assert verdict.err.startswith("megascale: " + expected.format(config=tmp_path / "config.toml"))


def test_own_layout_that_does_not_fit_is_said(verify: Callable[..., Verdict]) -> None:
    verdict = verify("debug", "--nproc", "1", "--parallel.node=4", "--json")
    assert verdict.status == 0, verdict.err
    assert "parallel.node = 4 does not divide" in verdict.document["own_layout"]
    assert len(verdict.document["layouts"]) == 1


# --- which layouts, of which model -----------------------------------------------------------------------------------


@pytest.mark.bulky
def test_covering_has_every_combination_and_every_meeting() -> None:
    every = distinct(list(possible(Config(model=INTERNAL), 8)))
    chosen = covering(every)
    for choices in (
        lambda case: (case.mesh, case.strategy) if case.mesh.cp == 1 else None,
        lambda case: (case.mesh.cp > 1, case.strategy),
        lambda case: (case.mesh.cp, case.mesh.sequence < case.mesh.ffn, case.mesh.sequence > case.mesh.ffn),
        lambda case: (case.strategy, case.parallel.vocabulary) if case.mesh.node > 1 else None,
        lambda case: (case.strategy, case.parallel.schedule) if case.mesh.pp > 1 else None,
    ):
        assert set(map(choices, chosen)) == set(map(choices, every))
    assert len(chosen) < len(every) / 2


@pytest.mark.bulky
def test_own_layout_comes_first_and_once() -> None:
    config = Config(model=MIXTRAL)
    config = replace(config, parallel=replace(config.parallel, node=4, attention="tp", vocabulary="sharded"))
    cases, note = all_cases(config, 8)
    assert note == ""
    assert cases[0] == own_case(config, 8)
    assert len({str(case.words) for case in cases}) == len(cases)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
def test_small_model_divides_as_the_large_one(preset: str, ranks: int) -> None:
    large = PRESETS[preset]
    small = scaled_down(large, ranks)
    small.check()
    assert small.layers <= 2
    for name in ("heads", "experts", "ffn_hidden", "vocab", "sequence_length"):
        assert getattr(small, name) % ranks == 0 or getattr(large, name) % ranks != 0, name
    assert small.qk_norm == large.qk_norm
    assert (small.shared_hidden > 0) == (large.shared_hidden > 0)
    assert small.top_k < small.experts


def test_the_small_model_has_every_kind_of_layer() -> None:
    large = replace(
        PRESETS["deepseek-moe"], dense_layers=7, sliding_window=4096, full_attention_every=6, attention_sinks=True,
    )  # fmt: skip
    small = scaled_down(large, 4)
    small.check()

    def kinds(model: ModelConfig) -> set[LayerSpec]:
        return {replace(spec, window=min(spec.window, 1)) for spec in model.layer_kinds}

    assert kinds(small) == kinds(large)
    assert len(kinds(large)) == 4
    assert small.layers == 4


def test_alike_keeps_common_divisors() -> None:
    assert alike(14336, 8, 16) == 16
    assert alike(12, 8, 16) == 12
    assert alike(100, 8, 16) == 20


def test_interleaved_gets_as_many_layers_as_it_has_stages() -> None:
    parallel = replace(Config().parallel, pp=4, schedule="interleaved", virtual_stages=2)
    case = case_of(parallel, Config(model=MIXTRAL), 4)
    assert case.model.layers == 8
    assert case.micros % 4 == 0


def test_tolerance_is_what_the_product_promises() -> None:
    assert ranks_of_layouts.TOLERANCE == 1e-5

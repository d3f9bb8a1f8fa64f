"""Predicted step times against published ones.

A row of the file says what a source says: software, model, GPU, layout and what was measured. Here it becomes a config
and a cluster profile, is priced like any other layout, and the price is compared in the unit the source gives: seconds
a step, else tokens per second and GPU, else TFLOP/s or MFU with FLOPs counted as that source counts them.

What is particular to a software stack stands in `stacks/`: its profile (what its products and messages reach of the
hardware) and its habits (what it overlaps, how it splits experts where the row does not say). No row has a number of
its own. Some rows were used to choose the profile of their stack, at most a third; they are marked and do not count in
the errors.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from megascale_moe.config import (
    Config,
    ConfigError,
    ModelConfig,
    OverlapConfig,
    ParallelConfig,
    TrainConfig,
    WireConfig,
)
from megascale_moe.model.counts import attention_flops_per_token, counts
from megascale_moe.planner.cluster import Cluster, load
from megascale_moe.planner.step import price
from megascale_moe.presets import PRESETS
from megascale_moe.tools.validation.rows import UNITS, PublishedRow, read

Use = Literal["test", "calibration", "excluded"]


# --- stacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """Settings of a software stack that its rows do not state.

    Attributes:
        software, gpu, precision: patterns of the columns of its rows. calibration: rows used to choose its profile.
        order, split, remat, micro_batches: as `OverlapConfig`.
        hides_synchronisation: behind the backward, also with serial layers.
        gradients: their format on the wire. ffn: of layers with experts, where a row says nothing of their width:
            "tp" has each expert's width over the ranks that share attention, "ep" has experts whole. folded: what
            marks programs that have them whole all the same. virtual_stages: of a pipeline rank, where a row does not
            say; 0: as many as it has layers. mtp: whether DeepSeek-V3 comes with its second head. flops: whether the
            source counts causal attention "half" or in "full".
    """

    name: str = ""
    software: str = ""
    gpu: str = ""
    precision: str = ""
    calibration: tuple[str, ...] = ()
    order: Literal["serial", "paper", "scheduled"] = "serial"
    split: str = "none"
    remat: Literal["none", "paper", "full", "budget"] = "none"
    micro_batches: int = 1
    hides_synchronisation: bool = True
    gradients: Literal["fp32", "bf16"] = "fp32"
    dispatch: Literal["auto", "all_to_all", "all_gather"] = "all_to_all"
    ffn: Literal["tp", "ep"] = "ep"
    folded: str = ""
    virtual_stages: int = 1
    mtp: bool = False
    flops: Literal["half", "full"] = "half"


@dataclass(frozen=True)
class Stack:
    """Software on one kind of GPU."""

    habits: Habits
    cluster: Cluster

    @property
    def name(self) -> str:
        """For people."""
        return self.habits.name


@cache
def stacks() -> tuple[Stack, ...]:
    """All that come with the package."""
    folder = resources.files("megascale_moe.planner") / "stacks"
    found = sorted((item for item in folder.iterdir() if item.name.endswith(".toml")), key=lambda item: item.name)
    return tuple(_stack(item) for item in found)


def _stack(item: Traversable) -> Stack:
    raw = tomllib.loads(item.read_text(encoding="utf-8"))
    rows = raw.pop("rows")
    rows["calibration"] = tuple(rows.get("calibration", ()))
    return Stack(Habits(name=raw["stack"], **rows), load(item.name.removesuffix(".toml")))


def stack_of(row: PublishedRow) -> Stack | None:
    """The stack that a row was measured with, or its hardware's own profile where no stack is known; None: neither."""
    for stack in stacks():
        patterns = {"stack": stack.habits.software, "gpu": stack.habits.gpu, "precision": stack.habits.precision}
        if all(re.search(pattern, row.text(column)) for column, pattern in patterns.items()):
            return stack
    found = re.search(r"(?i)\b(?:DGX-)?(A100|H100|H800|H200|H20|GB200|B200)\b", row.text("gpu"))
    if not found:
        return None
    return Stack(Habits(name=f"{row.text('stack')} on {found[1]} (not calibrated)"), load(found[1].lower()))


# --- from a row to a config ------------------------------------------------------------------------------------------


class Unpredictable(Exception):
    """A row that is none of the user's errors, but nothing that can be priced; says why."""


@cache
def _published() -> dict[str, Any]:
    return tomllib.loads((resources.files(__package__) / "published.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class PricedRow:
    """The layout that is priced for a row.

    Attributes:
        products: the format of products with weights, if not the compute dtype. flops: per token, as the source counts.
    """

    stack: Stack
    config: Config
    gpus: int
    products: str
    flops: float


def case_of(row: PublishedRow) -> PricedRow:
    """Map a row.

    Raises:
        Unpredictable: with the reason.
        ConfigError: a cell is not what its column needs, or the layout does not fit the model.
    """
    for rule in _published()["excluded"]:
        if all(re.search(pattern, row.text(column)) for column, pattern in rule["where"].items()):
            raise Unpredictable(rule["reason"])
    for column in ("gpus", "sequence_length"):
        if not row.text(column):
            raise Unpredictable(f"the source gives no {column}")
    stack = stack_of(row)
    if stack is None:
        raise Unpredictable(f"no profile for GPU {row.text('gpu')!r}")
    habits, model = stack.habits, model_of(row)
    gpus = row.count("gpus")
    counted = _with_mtp(model) if _has_mtp(row, habits) else model
    parallel = _parallel(row, habits, counted)
    train = _batches(row, gpus, parallel)
    overlap = OverlapConfig(
        order=habits.order, split=habits.split, remat=_remat(row, habits), micro_batches=habits.micro_batches
    )
    config = Config(
        model=counted, parallel=parallel, overlap=overlap, train=train, wire=WireConfig(gradients=habits.gradients)
    )
    if not row.text("virtual_stages"):
        config = _in_whole_groups(config, gpus)
    config.check()
    products = "fp8" if "fp8" in row.text("precision").lower() else ""
    flops = counts(counted).flops_per_token
    if habits.flops == "full":
        flops += 3 * counted.layers * attention_flops_per_token(counted)
    return PricedRow(stack, config, gpus, products, flops)


def model_of(row: PublishedRow) -> ModelConfig:
    """The model that a row names, with the row's sequence length."""
    name = re.sub(r"\([^)]*\)|w/o mtp|\bdense\b", " ", row.text("model").lower())
    cut = re.search(r"\b(\d+)l\b", name)
    name = " ".join(re.sub(r"\b\d+l\b", " ", name).split()).replace("llama3.1", "llama3").replace("llama-3", "llama3")
    models = _published()["models"]
    if name not in models:
        raise Unpredictable(f"model {row.text('model')!r} is not known; known: {', '.join(sorted(models))}")
    entries = dict(models[name])
    base = PRESETS[preset] if (preset := entries.pop("preset", "")) else ModelConfig()
    dense, truncated = entries.pop("dense", 0), entries.pop("truncated_dense", None)
    model = replace(base, preset="", sequence_length=row.count("sequence_length"), **entries)
    if cut:
        fewer = model.dense_layers if truncated is None else min(truncated, model.dense_layers)
        model = replace(model, layers=int(cut[1]), dense_layers=fewer)
    if dense:
        model = replace(model, dense_layers=model.layers, dense_ffn_hidden=dense, experts=1, top_k=1)
    return model


def _has_mtp(row: PublishedRow, habits: Habits) -> bool:
    name = row.text("model").lower()
    return habits.mtp and name.startswith("deepseek-v3") and "w/o mtp" not in name


def _with_mtp(model: ModelConfig) -> ModelConfig:
    """Multi-token prediction is one layer more, whose hidden states pass the head as well: a head twice as wide. What
    is left out is the product that joins two hidden states, 0.6 of the 10.5 GFLOP a token."""
    return replace(model, layers=model.layers + 1, vocab=2 * model.vocab)


def _parallel(row: PublishedRow, habits: Habits, model: ModelConfig) -> ParallelConfig:
    tp, sp, ep, pp = (row.count(column) for column in ("tp", "sp", "ep", "pp"))
    sequence = sp > 1 and tp == 1
    node = max(tp, sp)
    dense = all(spec.dense for spec in model.layer_kinds)
    whole = habits.ffn == "ep" or sequence or bool(habits.folded and re.search(habits.folded, row.text("layout_text")))
    etp = row.count("etp", 1 if whole else tp)
    ffn: Literal["ep", "tp", "ep+tp"]
    if node == 1 or (not dense and etp == 1 and ep % node == 0):
        ffn, ep, etp = "ep", ep if not dense else 1, 1
    elif dense or ep == 1:
        ffn, ep, etp = "tp", 1, node
    else:
        ffn = "ep+tp"
    stages = row.count("virtual_stages", _stages(habits, model, pp))
    stages = 1 if pp == 1 else max(min(stages, model.layers // pp), 1)
    return ParallelConfig(
        pp=pp, node=node, attention="sp" if sequence or node == 1 else "tp", ffn=ffn, ep=ep, etp=etp,
        vocabulary="sharded" if node > 1 and model.vocab % node == 0 else "replicated",
        dispatch="auto" if ffn == "tp" or ep == 1 else habits.dispatch,
        schedule="interleaved" if stages > 1 else "1f1b", virtual_stages=stages,
    )  # fmt: skip


def _stages(habits: Habits, model: ModelConfig, pp: int) -> int:
    if habits.virtual_stages:
        return habits.virtual_stages
    return max(model.layers // pp, 1) if pp > 1 else 1


def _in_whole_groups(config: Config, gpus: int) -> Config:
    """An interleaved schedule takes pp micro-batches at a time; where they do not divide, nobody ran one."""
    p, t = config.parallel, config.train
    micros = t.global_batch // max(gpus // (p.pp * p.node), 1) // t.micro_batch
    if p.schedule != "interleaved" or micros % p.pp == 0:
        return config
    return replace(config, parallel=replace(p, schedule="1f1b", virtual_stages=1))


def _batches(row: PublishedRow, gpus: int, p: ParallelConfig) -> TrainConfig:
    """Where a source gives no batch, the number of micro-batches may stand in the text of the layout."""
    text = row.text("layout_text")
    named = re.search(r"mbs\s*=?\s*(\d+)", text)
    micro = row.count("micro_batch", int(named[1]) if named else 1)
    groups = max(gpus // (p.pp * p.node), 1)
    batch = row.text("global_batch")
    if tokens := re.fullmatch(r"(\d+)M tokens", batch):
        found = (int(tokens[1]) << 20) // row.count("sequence_length")
    elif batch:
        found = row.count("global_batch")
    elif micros := re.search(r"microbatches\s*=\s*(\d+)", text):
        found = int(micros[1]) * micro * groups
    else:
        raise Unpredictable("the source states no batch size")
    return TrainConfig(dtype="bf16", global_batch=found, micro_batch=micro)


def _remat(row: PublishedRow, habits: Habits) -> Literal["none", "paper", "full", "budget"]:
    """Selective recomputation makes attention scores again, which fused attention does anyway: nothing more."""
    stated: dict[str, Literal["none", "full"]] = {"full": "full", "selective": "none", "none": "none"}
    return stated.get(row.text("recompute"), habits.remat)


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowResult:
    """A row, compared.

    Attributes:
        predicted, reference: in `unit`; None where there is none. error: predicted / reference - 1.
        use: whether it counts in the errors. reason: why it is excluded, or what it calibrates. seconds: of a step.
    """

    id: str
    stack: str
    predicted: float | None
    reference: float | None
    unit: str
    error: float | None
    use: Use
    reason: str
    seconds: float | None = None


@dataclass(frozen=True)
class Validation:
    """All rows of a file."""

    rows: tuple[RowResult, ...] = field(default_factory=tuple)

    def errors(self, stack: str = "", use: Use = "test") -> list[float]:
        """Absolute relative errors, of one stack or of all."""
        return [
            abs(row.error) for row in self.rows if row.error is not None and row.use == use and stack in ("", row.stack)
        ]

    @property
    def mean_error(self) -> float | None:
        """Over test rows; None without any."""
        return _mean(self.errors())

    @property
    def worst_error(self) -> float | None:
        """Over test rows; None without any."""
        return max(self.errors(), default=None)

    def by_stack(self) -> list[tuple[str, int, float, float]]:
        """(stack, test rows, mean, worst) in the order of the file, of the stacks that have test rows."""
        names = dict.fromkeys(row.stack for row in self.rows if row.use == "test")
        return [(name, len(e), sum(e) / len(e), max(e)) for name in names if (e := self.errors(name))]

    def document(self) -> dict[str, Any]:
        """For a file."""
        names = [each.name for each in fields(RowResult) if each.name != "seconds"]
        return {
            "rows": [{name: getattr(row, name) for name in names} for row in self.rows],
            "mean_error": self.mean_error,
            "worst_error": self.worst_error,
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def reference_of(row: PublishedRow) -> tuple[float, str]:
    """(value, column) of what was measured.

    Raises:
        Unpredictable: nothing was.
    """
    for column in UNITS:
        value = row.number(column)
        if value is not None:
            return value, column
    raise Unpredictable("the source gives no speed")


def predict(row: PublishedRow) -> RowResult:
    """One row.

    Raises:
        ConfigError: a cell is not what its column needs.
    """
    value, unit = None, ""
    try:
        value, column = reference_of(row)
        unit = UNITS[column]
        case = case_of(row)
        seconds = _seconds(row, case)
    except Unpredictable as reason:
        stack = stack_of(row)
        name = stack.name if stack else row.text("stack")
        return RowResult(row.id, name, None, value, unit, None, "excluded", str(reason))
    predicted = in_unit(column, seconds, case)
    calibrates = row.id in case.stack.habits.calibration
    return RowResult(
        row.id, case.stack.name, predicted, value, unit, predicted / value - 1,
        "calibration" if calibrates else "test", "used to choose the profile" if calibrates else "", seconds,
    )  # fmt: skip


def _seconds(row: PublishedRow, case: PricedRow) -> float:
    try:
        return price(
            case.config, case.stack.cluster, case.gpus, products=case.products,
            hides_synchronisation=case.stack.habits.hides_synchronisation,
        ).seconds  # fmt: skip
    except ConfigError as error:
        raise Unpredictable(f"no layout of this system: {error}") from error


def in_unit(column: str, seconds: float, case: PricedRow) -> float:
    """A step's seconds as a column has them."""
    model, train = case.config.model, case.config.train
    tokens = train.global_batch * model.sequence_length / seconds / case.gpus
    if column == "step_s":
        return seconds
    if column == "tokens_per_s_gpu":
        return tokens
    if column == "tflops_gpu":
        return tokens * case.flops / 1e12
    return 100 * tokens * case.flops / case.stack.cluster.peaks["bf16"]


def validate(path: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> Validation:
    """Predict every row of a file.

    Args:
        progress: called with what is being done, how far, of how much.

    Raises:
        ConfigError: the file or a row is not as it must be.
    """
    found, rows = [], read(path)
    for number, row in enumerate(rows, 1):
        found.append(predict(row))
        progress("rows", number, len(rows))
    return Validation(tuple(found))

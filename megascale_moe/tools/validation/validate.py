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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
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
from megascale_moe.train.progress import Update, silent

Remat = Literal["none", "paper", "full", "budget"]


# --- stacks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Software on one kind of GPU: its profile, and settings that its rows do not state.

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

    name: str
    cluster: Cluster
    software: str = ""
    gpu: str = ""
    precision: str = ""
    calibration: Sequence[str] = ()
    order: Literal["serial", "paper", "scheduled"] = "serial"
    split: str = "none"
    remat: Remat = "none"
    micro_batches: int = 1
    hides_synchronisation: bool = True
    gradients: Literal["fp32", "bf16"] = "fp32"
    dispatch: Literal["auto", "all_to_all", "all_gather"] = "all_to_all"
    ffn: Literal["tp", "ep"] = "ep"
    folded: str = ""
    virtual_stages: int = 1
    mtp: bool = False
    flops: Literal["half", "full"] = "half"


@cache
def stacks() -> tuple[Stack, ...]:
    """Return all that come with the package."""
    folder = resources.files("megascale_moe.planner") / "stacks"
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
    raw = {name.removesuffix(".toml"): tomllib.loads((folder / name).read_text(encoding="utf-8")) for name in names}
    return tuple(Stack(each["stack"], load(name), **each["rows"]) for name, each in raw.items())


def stack_of(row: PublishedRow) -> Stack | None:
    """Return the stack that a row was measured with.

    Where no stack is known it is one with its hardware's own profile; None if that is not known either.
    """
    for stack in stacks():
        patterns = {"stack": stack.software, "gpu": stack.gpu, "precision": stack.precision}
        if _matches(row, patterns):
            return stack
    gpu = re.search(r"(?i)\b(?:DGX-)?(A100|H100|H800|H200|H20|GB200|B200)\b", row.text("gpu"))
    return Stack(f"{row.text('stack')} on {gpu[1]} (not calibrated)", load(gpu[1].lower())) if gpu else None


def _matches(row: PublishedRow, patterns: Mapping[str, str]) -> bool:
    return all(re.search(pattern, row.text(column)) for column, pattern in patterns.items())


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
        if _matches(row, rule["where"]):
            raise Unpredictable(rule["reason"])
    for column in ("gpus", "sequence_length"):
        if not row.text(column):
            raise Unpredictable(f"the source gives no {column}")
    stack = stack_of(row)
    if stack is None:
        raise Unpredictable(f"no profile for GPU {row.text('gpu')!r}")
    model, gpus = model_of(row), row.count("gpus")
    named = row.text("model").lower()
    if stack.mtp and named.startswith("deepseek-v3") and "w/o mtp" not in named:
        # Multi-token prediction is one layer more, whose hidden states pass the head as well: a head twice as wide.
        # What is left out is the product that joins two hidden states, 0.6 of the 10.5 GFLOP a token.
        model = replace(model, layers=model.layers + 1, vocab=2 * model.vocab)
    # Selective recomputation makes attention scores again, which fused attention does anyway: nothing more.
    stated: dict[str, Remat] = {"full": "full", "selective": "none", "none": "none"}
    remat = stated.get(row.text("recompute"), stack.remat)
    parallel = _parallel(row, stack, model)
    train = _batches(row, gpus, parallel)
    if parallel.schedule == "interleaved" and not row.text("virtual_stages"):
        micros = train.global_batch // max(gpus // (parallel.pp * parallel.cp * parallel.node), 1) // train.micro_batch
        if micros % parallel.pp:  # it takes pp micro-batches at a time; where they do not divide, nobody ran one
            parallel = replace(parallel, schedule="1f1b", virtual_stages=1)
    overlap = OverlapConfig(order=stack.order, split=stack.split, remat=remat, micro_batches=stack.micro_batches)
    wire = WireConfig(gradients=stack.gradients)
    config = Config(model=model, parallel=parallel, overlap=overlap, train=train, wire=wire)
    config.check()
    products = "fp8" if "fp8" in row.text("precision").lower() else ""
    flops = counts(model).flops_per_token
    if stack.flops == "full":
        flops += 3 * model.layers * attention_flops_per_token(model)
    return PricedRow(stack, config, gpus, products, flops)


def model_of(row: PublishedRow) -> ModelConfig:
    """Return the model that a row names, with the row's sequence length."""
    name = re.sub(r"\([^)]*\)|w/o mtp|\bdense\b", " ", row.text("model").lower())
    layers = re.search(r"\b(\d+)l\b", name)
    name = " ".join(re.sub(r"\b\d+l\b", " ", name).split()).replace("llama3.1", "llama3").replace("llama-3", "llama3")
    models = _published()["models"]
    if name not in models:
        raise Unpredictable(f"model {row.text('model')!r} is not known; known: {', '.join(sorted(models))}")
    entries = dict(models[name])
    preset, dense, truncated = (entries.pop(key, None) for key in ("preset", "dense", "truncated_dense"))
    base = PRESETS[preset] if preset else ModelConfig()
    model = replace(base, preset="", sequence_length=row.count("sequence_length"), **entries)
    if layers:
        fewer = model.dense_layers if truncated is None else min(truncated, model.dense_layers)
        model = replace(model, layers=int(layers[1]), dense_layers=fewer)
    if dense:
        model = replace(model, dense_layers=model.layers, dense_ffn_hidden=dense, experts=1, top_k=1)
    return model


def _parallel(row: PublishedRow, stack: Stack, model: ModelConfig) -> ParallelConfig:
    tp, sp, cp, ep, pp = (row.count(column) for column in ("tp", "sp", "cp", "ep", "pp"))
    sequence = sp > 1 and tp == 1
    node = max(tp, sp)
    dense = all(spec.dense for spec in model.layer_kinds)
    whole = stack.ffn == "ep" or sequence or bool(stack.folded and re.search(stack.folded, row.text("layout_text")))
    etp = row.count("etp", 1 if whole else tp)
    ffn: Literal["ep", "tp", "ep+tp"]
    if node == 1 or (not dense and etp == 1 and ep % node == 0):
        ffn, ep, etp = "ep", ep if not dense else 1, 1
    elif dense or ep == 1:
        ffn, ep, etp = "tp", 1, node
    else:
        ffn = "ep+tp"
    most = max(model.layers // pp, 1) if pp > 1 else 1
    stages = min(row.count("virtual_stages", stack.virtual_stages or most), most)
    return ParallelConfig(
        pp=pp, cp=cp, node=node, attention="sp" if sequence or node == 1 else "tp", ffn=ffn, ep=ep, etp=etp,
        vocabulary="sharded" if node > 1 and model.vocab % node == 0 else "replicated",
        dispatch="auto" if ffn == "tp" or ep == 1 else stack.dispatch,
        schedule="interleaved" if stages > 1 else "1f1b", virtual_stages=stages,
    )  # fmt: skip


def _batches(row: PublishedRow, gpus: int, parallel: ParallelConfig) -> TrainConfig:
    """Return batch sizes; where a source gives none, the text of the layout may have the number of micro-batches."""
    text = row.text("layout_text")
    named = re.search(r"mbs\s*=?\s*(\d+)", text)
    micro = row.count("micro_batch", int(named[1]) if named else 1)
    if tokens := re.fullmatch(r"(\d+)M tokens", row.text("global_batch")):
        batch = (int(tokens[1]) << 20) // row.count("sequence_length")
    elif row.text("global_batch"):
        batch = row.count("global_batch")
    elif micros := re.search(r"microbatches\s*=\s*(\d+)", text):
        batch = int(micros[1]) * micro * max(gpus // (parallel.pp * parallel.cp * parallel.node), 1)
    else:
        raise Unpredictable("the source states no batch size")
    optimizer: Literal["adamw", "muon"] = "muon" if "muon" in row.text("model").lower() else "adamw"
    return TrainConfig(dtype="bf16", global_batch=batch, micro_batch=micro, optimizer=optimizer)


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowResult:
    """A row beside its prediction.

    Attributes:
        predicted, reference: in `unit`; None where there is none. error: predicted / reference - 1.
        use: whether it counts in the errors. reason: why it is excluded, or what it calibrates.
    """

    id: str
    stack: str
    predicted: float | None
    reference: float | None
    unit: str
    error: float | None
    use: Literal["test", "calibration", "excluded"]
    reason: str


@dataclass(frozen=True)
class Validation:
    """All rows of a file."""

    rows: tuple[RowResult, ...] = ()

    def errors(self, stack: str = "") -> list[float]:
        """Return the absolute relative errors of test rows, of one stack or of all."""
        rows = (row for row in self.rows if row.use == "test" and stack in ("", row.stack))
        return [abs(row.error) for row in rows if row.error is not None]

    def by_stack(self) -> list[tuple[str, int, float, float]]:
        """Return (stack, test rows, mean, worst) in the order of the file, of the stacks that have test rows."""
        names = dict.fromkeys(row.stack for row in self.rows if row.use == "test")
        return [(name, len(errors), fmean(errors), max(errors)) for name in names if (errors := self.errors(name))]

    def document(self) -> dict[str, Any]:
        """Return the --json document; errors are None without any test row."""
        rows, errors = [asdict(row) for row in self.rows], self.errors()
        return {"rows": rows, "mean_error": fmean(errors) if errors else None, "worst_error": max(errors, default=None)}


def reference_of(row: PublishedRow) -> tuple[float, str]:
    """Return the (value, column) of what was measured.

    Raises:
        Unpredictable: nothing was.
    """
    for column in UNITS:
        value = row.number(column)
        if value is not None:
            return value, column
    raise Unpredictable("the source gives no speed")


def predict(row: PublishedRow) -> RowResult:
    """Compare one row.

    Raises:
        ConfigError: a cell is not what its column needs.
    """
    value, unit = None, ""
    try:
        value, column = reference_of(row)
        unit = UNITS[column]  # stays where the row cannot be priced
        case = case_of(row)
        try:
            seconds = price(
                case.config, case.stack.cluster, case.gpus, products=case.products,
                hides_synchronisation=case.stack.hides_synchronisation,
            ).seconds  # fmt: skip
        except ConfigError as error:
            raise Unpredictable(f"no layout of this system: {error}") from error
    except Unpredictable as reason:
        stack = stack_of(row)
        name = stack.name if stack else row.text("stack")
        return RowResult(row.id, name, None, value, unit, None, "excluded", str(reason))
    predicted = in_unit(column, seconds, case)
    calibrates = row.id in case.stack.calibration
    return RowResult(
        row.id, case.stack.name, predicted, value, unit, predicted / value - 1,
        "calibration" if calibrates else "test", "used to choose the profile" if calibrates else "",
    )  # fmt: skip


def in_unit(column: str, seconds: float, case: PricedRow) -> float:
    """Return a step's seconds as a column has them."""
    tokens = case.config.train.global_batch * case.config.model.sequence_length / seconds / case.gpus
    flops = tokens * case.flops
    return {
        "step_s": seconds, "tokens_per_s_gpu": tokens, "tflops_gpu": flops / 1e12,
        "mfu_pct": 100 * flops / case.stack.cluster.peaks["bf16"],
    }[column]  # fmt: skip


def validate(path: Path, progress: Update = silent) -> Validation:
    """Predict every row of a file.

    Raises:
        ConfigError: the file or a row is not as it must be.
    """
    results, rows = [], read(path)
    for number, row in enumerate(rows, 1):
        results.append(predict(row))
        progress("rows", number, len(rows))
    return Validation(tuple(results))

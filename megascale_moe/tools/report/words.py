"""Numbers and layouts in words, and the sentence under each picture that says what to see in it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.strategies import registry

Records = Sequence[dict[str, Any]]


def duration(seconds: float) -> str:
    """Return seconds in words."""
    return _scaled(seconds, ((1.0, " s"), (1e-3, " ms"), (1e-6, " µs")))


def count(number: float) -> str:
    """Return a number in thousands, millions and so on."""
    return _scaled(number, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1, "")))


def size(number: float) -> str:
    """Return bytes in words."""
    return _scaled(number, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))


def _scaled(number: float, units: Sequence[tuple[float, str]]) -> str:
    """Return three digits in the largest of `units` that leaves one to three of them before the point."""
    scale, unit = next((each for each in units if number >= each[0] * 0.9995), units[-1])
    number /= scale
    return f"{number:,.0f}{unit}" if number >= 999.5 else f"{number:.3g}{unit}"


def share(part: float, whole: float) -> str:
    """Return percent."""
    return f"{part / whole:.1%}" if whole else "0 %"


def outcome(records: Records) -> dict[str, Any]:
    """Return the final figures of a run; speeds are of its last half."""
    evaluations = _known(records, "eval_loss")
    later = [r for r in _last_half(records) if r["step_s"] and r["exposed_comm_s"] is not None]
    total = sum(record["step_s"] for record in later)
    return {
        "step": records[-1]["step"], "loss": records[-1]["loss"], "eval_loss": evaluations[-1] if evaluations else None,
        "tokens_per_s": _median(records, "tokens_per_s"),
        "exposed_comm_share": sum(record["exposed_comm_s"] for record in later) / total if total else None,
        "step_s": _median(records, "step_s"),
    }  # fmt: skip


def _known(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _last_half(records: Records) -> Records:
    """Return the records that speeds are of: the first steps measure and warm up."""
    return records[len(records) // 2 :]


def _median(records: Records, name: str) -> float | None:
    """Return the median over the last half of a run, None where nothing finite is."""
    values = _known(_last_half(records), name)
    return median(values) if values else None


def layout(config: Config, mesh: Mesh) -> str:
    """Return the mesh and what each module does with it."""
    if mesh.world == 1:
        return "one rank, no communication"
    parallel, parts = config.parallel, [f"{mesh.world:,} ranks"]
    if mesh.pp > 1:
        virtual = f", {parallel.virtual_stages} stages per rank" if parallel.virtual_stages > 1 else ""
        parts.append(f"{mesh.pp} pipeline stages ({parallel.schedule.replace('_', '-')}{virtual})")
    if mesh.dp > 1:
        parts.append(f"{mesh.dp} data-parallel {'nodes' if mesh.cp == 1 else 'groups of nodes'}")
    if mesh.cp > 1:
        parts.append(f"{mesh.cp} nodes that share each sequence")
    if mesh.node > 1:
        attention = registry.named(registry.ATTENTION, parallel.attention, "parallel.attention")
        parts.append(f"{mesh.node} ranks per node with {attention.title}")
    experts = [f"spread over {mesh.ep} ranks"] if mesh.ep > 1 else []
    experts += [f"cut in width over {mesh.etp}"] if mesh.etp > 1 else []
    return ", ".join([*parts, "experts " + " and ".join(experts)] if experts else parts)


def overlap(config: Config, pieces: int) -> str:
    """Return order, splitting and recomputation in words."""
    o = config.overlap
    cut = "communication uncut" if pieces == 1 else f"communication cut into {pieces} pieces"
    remat = {"none": "no recomputation", "full": "full recomputation"}
    return f"order “{o.order}”, {cut}, {remat.get(o.remat, f'recomputation “{o.remat}”')}"


# --- under the pictures -----------------------------------------------------------------------------------------------


SUPPOSED = (
    "Nothing is overlapped here: the first list is the one in use, the second what overlap.order = “scheduled” would "
    "make of it. "
)


def of_timeline(timeline: dict[str, Any]) -> str:
    """Return a sentence on how the two lists differ."""
    before, after = timeline["plain"]["totals"], timeline["overlapped"]["totals"]
    if not before["communication"]:
        return "This rank talks to nobody: the link lanes are empty and computation never waits."
    used = SUPPOSED if timeline.get("supposed") else ""
    now, then = (f"{duration(t['exposed'])} of {duration(t['seconds'])}" for t in (after, before))
    if abs(before["exposed"] - after["exposed"]) <= 0.01 * before["exposed"]:
        return (
            f"{used}Hatched stretches are waits. Both lists wait equally long, {now}: this order hides nothing that "
            "the plain list does not hide by itself."
        )
    saved = 1 - after["seconds"] / before["seconds"]
    gain = f"the step becomes {saved:.1%} shorter" if saved > 0.0005 else "the step does not become shorter by it"
    return (
        f"{used}Hatched stretches are exposed communication: {then} in the plain list and {now} with "
        f"overlap. Look how bars of the link lanes slide under those of the computation; {gain}."
    )


def of_part(timeline: dict[str, Any]) -> str:
    """Return a sentence on what is drawn of a step that is too long; empty if all of it is."""
    layers = timeline["drawn_layers"]
    if not layers:
        return ""
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    operators, micros = timeline["overlapped"]["totals"]["operators"], timeline["micro_batches"]
    return (
        f"A whole step of this rank has {operators:,} operators ({micros:,} micro-batches of "
        f"{len(timeline['layers']):,} layers); drawn are forward and backward of one micro-batch through {which}. "
        "Numbers in text and tables are of the whole step."
    )


def of_measured(timeline: dict[str, Any]) -> str:
    """Return why the measured step is not the simulated one."""
    if not timeline.get("measured"):
        return ""
    pipeline = (
        " A receive lasts until the other stage has sent: bubbles of the pipeline show as waits."
        if timeline["mesh"]["pp"] > 1 else ""
    )  # fmt: skip
    return (
        "The measured step contains what the simulation leaves out: the host between two operators, ranks that come "
        "late, and links that carry several messages at a time. A message is drawn until its result was read, and may "
        f"have arrived earlier.{pipeline}"
    )


def of_kinds(timeline: dict[str, Any]) -> str:
    """Return which communication costs most."""
    kinds = timeline["overlapped"]["kinds"]
    if not kinds:
        return "Nothing travels: there is one rank."
    total, bare = (sum(kind[name] for kind in kinds) for name in ("seconds", "exposed"))
    worst = max(kinds, key=lambda kind: kind["exposed"])
    if not bare:
        return f"All {duration(total)} of communication are hidden."
    return (
        "Filled is hidden under computation, hatched is exposed. With overlap "
        f"{share(max(total - bare, 0.0), total)} of {duration(total)} of communication are hidden. The largest rest is "
        f"{worst['name']} ({PHASES[worst['phase']]}): {duration(worst['exposed'])}, {share(worst['exposed'], bare)} of "
        "all that is not."
    )


PHASES = {
    "F": "forward", "B": "input gradient", "W": "weight gradient", "R": "recomputed",
    "O": "optimizer and synchronisation",
}  # fmt: skip


def of_memory(memory: dict[str, Any], remat: str) -> str:
    """Return where the peak is, and what the policies differ in."""
    what = "a step" if memory["whole"] else "one micro-batch through the first layers"
    text, sizes = f"Activations and messages of {what} peak at {size(memory['peak'])}. ", memory["kept"]
    if not sizes["none"]:
        return text
    least, own = min(sizes, key=sizes.__getitem__), sizes[remat]
    text += f"Of one micro-batch, the policy in use (“{remat}”) keeps {size(own)} for its backward"
    if least == remat:
        return f"{text}, {share(own, sizes['none'])} of everything."
    return f"{text}; “{least}” would keep {share(sizes[least], own)} of that and recompute the rest."


def of_loss(records: Records) -> str:
    """Return whether the run learned; empty without a run."""
    if not records:
        return ""
    first, last = records[0]["loss"], records[-1]["loss"]
    if first is None or last is None:
        return "The loss is not finite in places, which leaves gaps: the run diverged there."
    way = "falls" if last < first else "rises"
    held = _known(records, "eval_loss")
    unseen = f" On text it has not seen the loss ends at {held[-1]:.3f}." if held else ""
    return f"The training loss {way} from {first:.3f} to {last:.3f} in {len(records):,} steps.{unseen}"


def of_speed(records: Records) -> str:
    """Return throughput in a sentence."""
    values = [value for value in _known(_last_half(records), "tokens_per_s") if value]
    if not values:
        return ""
    return (
        f"Typical of the last half of the run: {count(median(values))} tokens/s, from {count(min(values))} to "
        f"{count(max(values))}. The first steps warm up; other work of the machine shows as a dip."
    )


def of_norm(records: Records, clip: float) -> str:
    """Return how often gradients were clipped."""
    norms = _known(records, "grad_norm")
    if not records:
        return ""
    if not clip or not norms:
        return "The length of the gradient; a spike here comes before one in the loss."
    clipped = sum(norm > clip for norm in norms)
    return f"Above {clip:g} (dashed) gradients are clipped, as in {clipped:,} of {len(norms):,} steps."


def of_load(records: Records) -> str:
    """Return the balance of experts."""
    loads = [[load for load in record.get("expert_load", []) if load is not None] for record in records]
    last = loads[-1] if loads else []
    if not last:
        return ""
    return (
        f"1 would be perfect balance. The busiest expert ends with {min(last):.2f} to {max(last):.2f} times the mean "
        f"load of its layer; the most extreme field of the run is {max(map(max, filter(None, loads))):.2f}."
    )

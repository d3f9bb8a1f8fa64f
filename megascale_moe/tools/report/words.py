"""Numbers and layouts in words, and the sentence under each picture that says what to see in it."""

from __future__ import annotations

from statistics import median
from typing import Any

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config
from megascale_moe.strategies import registry

LATER = 2  # speeds are of the last half of a run: the first steps measure and warm up


def duration(seconds: float) -> str:
    """Seconds in the unit that leaves one to three digits before the point."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale * 0.9995 or unit == "µs":
            break
    number = seconds / scale
    return f"{number:,.0f} {unit}" if number >= 999.5 else f"{number:.3g} {unit}"


def count(number: float) -> str:
    """A number of three digits and a thousand, a million or a billion."""
    for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= scale * 0.9995:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def size(number: float) -> str:
    """Bytes in three digits."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale * 0.9995:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def share(part: float, whole: float) -> str:
    """Percent."""
    return f"{part / whole:.1%}" if whole else "0 %"


def steady(records: list[dict[str, Any]], name: str) -> float | None:
    """The median over the last half of a run, None where nothing finite is."""
    later = records[len(records) // LATER :]
    values = [record[name] for record in later if record.get(name) is not None]
    return median(values) if values else None


def exposed_share(records: list[dict[str, Any]]) -> float | None:
    """Share of a step in which computation waited for communication, over the last half of a run."""
    later = [r for r in records[len(records) // LATER :] if r["step_s"] and r["exposed_comm_s"] is not None]
    total = sum(record["step_s"] for record in later)
    return sum(record["exposed_comm_s"] for record in later) / total if total else None


def layout(config: Config, mesh: Mesh) -> str:
    """The mesh and what each module does with it."""
    p = config.parallel
    if mesh.world == 1:
        return "one rank, no communication"
    parts = [f"{mesh.world:,} ranks"]
    if mesh.pp > 1:
        virtual = f", {p.virtual_stages} stages per rank" if p.virtual_stages > 1 else ""
        parts.append(f"{mesh.pp} pipeline stages ({p.schedule.replace('_', '-')}{virtual})")
    if mesh.dp > 1:
        parts.append(f"{mesh.dp} data-parallel nodes")
    if mesh.node > 1:
        attention = registry.named(registry.ATTENTION, p.attention, "parallel.attention")
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


def of_timeline(found: dict[str, Any]) -> str:
    """Return a sentence on how the two lists differ."""
    before, after = found["plain"]["totals"], found["overlapped"]["totals"]
    if not before["communication"]:
        return "This rank talks to nobody: the link lanes are empty and computation never waits."
    used = SUPPOSED if found.get("supposed") else ""
    now, then = (f"{duration(t['exposed'])} of {duration(t['seconds'])}" for t in (after, before))
    if abs(before["exposed"] - after["exposed"]) <= 0.01 * before["exposed"]:
        return (
            f"{used}Hatched stretches are waits. Both lists wait equally long, {now}: this order hides nothing that "
            "the plain list does not hide by itself."
        )
    saved = 1 - after["seconds"] / before["seconds"]
    outcome = f"the step becomes {saved:.1%} shorter" if saved > 0.0005 else "the step does not become shorter by it"
    return (
        f"{used}Hatched stretches are exposed communication: {then} in the plain list and {now} with "
        f"overlap. Look how bars of the link lanes slide under those of the computation; {outcome}."
    )


def of_part(found: dict[str, Any]) -> str:
    """Return a sentence on what is drawn of a step that is too long; empty if all of it is."""
    layers = found["drawn_layers"]
    if not layers:
        return ""
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    operators, micros = found["overlapped"]["totals"]["operators"], found["micro_batches"]
    return (
        f"A whole step of this rank has {operators:,} operators ({micros:,} micro-batches of {len(found['layers']):,} "
        f"layers); drawn are forward and backward of one micro-batch through {which}. Numbers in text and tables are "
        "of the whole step."
    )


def of_measured(found: dict[str, Any]) -> str:
    """Why the measured step is not the simulated one."""
    if not found.get("measured"):
        return ""
    pipeline = (
        " A receive lasts until the other stage has sent: bubbles of the pipeline show as waits."
        if found["mesh"]["pp"] > 1 else ""
    )  # fmt: skip
    return (
        "The measured step contains what the simulation leaves out: the host between two operators, ranks that come "
        "late, and links that carry several messages at a time. A message is drawn until its result was read, and may "
        f"have arrived earlier.{pipeline}"
    )


def of_kinds(found: dict[str, Any]) -> str:
    """The communication that costs most."""
    kinds = found["overlapped"]["kinds"]
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


def of_memory(found: dict[str, Any], remat: str) -> str:
    """Where the peak is, and what the policies differ in."""
    what = "a step" if found["whole"] else "one micro-batch through the first layers"
    kept = found["kept"]
    text = f"Activations and messages of {what} peak at {size(found['peak'])}. "
    if not kept["none"]:
        return text
    least = min(kept, key=lambda name: kept[name])
    ours = f"the policy in use (“{remat}”) keeps {size(kept[remat])}"
    if least == remat:
        return f"{text}Of one micro-batch, {ours} for its backward, {share(kept[remat], kept['none'])} of everything."
    return (
        f"{text}Of one micro-batch, {ours} for its backward; “{least}” would keep {share(kept[least], kept[remat])} of "
        "that and do the rest again."
    )


def of_loss(records: list[dict[str, Any]]) -> str:
    """Whether the run learned."""
    first, last = records[0]["loss"], records[-1]["loss"]
    if first is None or last is None:
        return "The loss is not finite in places, which leaves gaps: the run diverged there."
    way = "falls" if last < first else "rises"
    held = [record["eval_loss"] for record in records if record.get("eval_loss") is not None]
    gap = f" On text it has not seen the loss ends at {held[-1]:.3f}." if held else ""
    return f"The training loss {way} from {first:.3f} to {last:.3f} in {len(records):,} steps.{gap}"


def of_speed(records: list[dict[str, Any]]) -> str:
    """Throughput."""
    usual = steady(records, "tokens_per_s")
    if usual is None:
        return ""
    values = [record["tokens_per_s"] for record in records[len(records) // LATER :] if record["tokens_per_s"]]
    return (
        f"Typical of the last half of the run: {count(usual)} tokens/s, from {count(min(values))} to "
        f"{count(max(values))}. The first steps warm up; other work of the machine shows as a dip."
    )


def of_norm(records: list[dict[str, Any]], clip: float) -> str:
    """How often gradients were clipped."""
    norms = [record["grad_norm"] for record in records if record["grad_norm"] is not None]
    if not clip or not norms:
        return "The length of the gradient; a spike here comes before one in the loss."
    clipped = sum(norm > clip for norm in norms)
    return f"Above {clip:g} (dashed) gradients are clipped, as in {clipped:,} of {len(norms):,} steps."


def of_load(records: list[dict[str, Any]]) -> str:
    """Balance of experts."""
    loads = [load for record in records for load in record.get("expert_load", []) if load is not None]
    last = [load for load in records[-1].get("expert_load", []) if load is not None]
    if not last:
        return ""
    return (
        f"1 would be perfect balance. The busiest expert ends with {min(last):.2f} to {max(last):.2f} times the mean "
        f"load of its layer; the most extreme field of the run is {max(loads):.2f}."
    )

"""Who takes part: every side by name, with its environment, its script and the cases it can run."""

from dataclasses import dataclass

OURS = "megascale"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One way of training the common case.

    `environment` names a folder made by setup.sh, or is empty for the Python that runs the driver.
    `optional` sides take part only when asked for by name: the slower of two forms that were compared.
    `half` marks a side that computes partly in BF16 even in the FP32 case. `together` ranks work on the same sequences.
    """

    script: str
    environment: str
    options: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    ranks: tuple[int, ...] = (1, 2)
    optional: bool = False
    half: bool = False
    together: int = 1

    def fits(self, dtype: str, ranks: int) -> bool:
        return dtype in self.dtypes and ranks in self.ranks


def transformers(*options: str, **fields: object) -> Side:
    return Side(script="side_transformers.py", environment="transformers", options=options, **fields)  # type: ignore[arg-type]


def torchtitan(*options: str, **fields: object) -> Side:
    return Side(script="side_torchtitan.py", environment="torchtitan", options=options, **fields)  # type: ignore[arg-type]


def on_cluster(name: str, *options: str, together: int = 1) -> Side:
    """A side of four ranks, for on_cluster.py."""
    environment = "" if name == OURS else name
    fields = {"dtypes": ("fp32",), "ranks": (4,), "together": together, "optional": True}
    return Side(script=f"side_{name}.py", environment=environment, options=options, **fields)  # type: ignore[arg-type]


FULL: dict[str, object] = {"dtypes": ("fp32",)}
HALF: dict[str, object] = {"dtypes": ("bf16",)}
PAIR: dict[str, object] = {"ranks": (2,)}

SIDES = {
    OURS: Side(script="side_megascale.py", environment=""),
    "megascale-dp": Side(script="side_megascale.py", environment="", options=("--layout=dp",), **PAIR),  # type: ignore[arg-type]
    "plain": Side(script="side_plain.py", environment=""),
    "plain-autocast": Side(script="side_plain.py", environment="", options=("--autocast",), **HALF, optional=True),  # type: ignore[arg-type]
    "transformers-grouped_mm": transformers("--experts=grouped_mm"),
    "transformers-eager": transformers("--experts=eager"),
    "transformers-batched_mm": transformers("--experts=batched_mm", optional=True),
    "transformers-grouped_mm-autocast": transformers("--experts=grouped_mm", "--half=autocast", **HALF, optional=True),
    "transformers-eager-autocast": transformers("--experts=eager", "--half=autocast", **HALF, optional=True),
    "transformers-grouped_mm-keep": transformers("--experts=grouped_mm", "--keep", **PAIR, optional=True),
    "transformers-compile": transformers("--experts=grouped_mm", "--compile"),
    "transformers-ddp-grouped_mm": transformers("--experts=grouped_mm", "--layout=ddp", **PAIR),
    "transformers-ddp-eager": transformers("--experts=eager", "--layout=ddp", **PAIR),
    "transformers-fsdp-grouped_mm": transformers("--experts=grouped_mm", "--layout=fsdp", **PAIR, optional=True),
    "torchtitan-full": torchtitan("--experts=full", **FULL),
    "torchtitan-full-compile": torchtitan("--experts=full", "--compile", **FULL),
    "torchtitan": torchtitan("--experts=shipped", half=True),
    "torchtitan-compile": torchtitan("--experts=shipped", "--compile", half=True),
    "torchtitan-full-keep": torchtitan("--experts=full", "--keep", **FULL, ranks=(2,), optional=True),
    "torchtitan-shard": torchtitan("--experts=shipped", "--half=shard", ranks=(1,), **HALF, optional=True),
    "deepspeed-autoep": Side(script="side_deepspeed.py", environment="deepspeed"),
    # four ranks
    "megascale-sp-ep": on_cluster(OURS, "--layout=sp+ep", "--order=scheduled", together=4),
    "megascale-sp-ep-two": on_cluster(OURS, "--layout=sp+ep", "--order=scheduled", "--two", together=4),
    "megascale-ep": on_cluster(OURS, "--layout=ep", "--order=scheduled"),
    "megascale-sp-ep-serial": on_cluster(OURS, "--layout=sp+ep", together=4),
    "megascale-sp-ep-serial-gloo": on_cluster(OURS, "--layout=sp+ep", "--gloo", together=4),
    "megascale-tp-serial": on_cluster(OURS, "--layout=tp+tp", together=4),
    "megascale-tp-serial-gloo": on_cluster(OURS, "--layout=tp+tp", "--gloo", together=4),
    "megatron-tp": on_cluster("megatron", "--tp=4", "--etp=4", together=4),
    "megatron-tp-ep": on_cluster("megatron", "--tp=4", "--ep=4", together=4),
    "megatron-tp2-ep": on_cluster("megatron", "--tp=2", "--ep=4", "--distributed", together=2),
    "megatron-ep": on_cluster("megatron", "--ep=4", "--distributed"),
    "megatron-ep-replicated": on_cluster("megatron", "--ep=4"),
    "torchtitan-ep": on_cluster("torchtitan", "--experts=full"),
    "transformers-ep": on_cluster("transformers", "--experts=grouped_mm"),
}


def choose(names: str | None, dtype: str, ranks: int) -> list[str]:
    """The sides of one case: those named, or all that are not optional."""
    if names:
        wanted = names.split(",")
        if unknown := [name for name in wanted if name not in SIDES]:
            raise SystemExit(f"unknown sides: {', '.join(unknown)}; there are {', '.join(SIDES)}")
    else:
        wanted = [name for name, side in SIDES.items() if not side.optional]
    return [name for name in wanted if SIDES[name].fits(dtype, ranks)]

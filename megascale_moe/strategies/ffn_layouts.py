"""Where experts lie: over ep ranks by index, over etp ranks by width, or both, and what of the other FFNs follows.

Every rank of a group of ep x etp consecutive ranks holds experts / ep of them, each with 1 / etp of its width: rows of
w13 (gate and up) and elements of its bias, columns of w2. The bias of w2 is added to a sum that several ranks have
terms of: each adds its share of the elements. The group is one node or several.
"""

from __future__ import annotations

from collections.abc import Sequence

from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import ModelConfig, ParallelConfig, require
from megascale_moe.config.refusals import divides, divisors
from megascale_moe.model.weights import Weight
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.placement import Box, Placement, rows, share, stacked_shares, tensor_rules
from megascale_moe.strategies.strategy import FFNStrategy, Rules

EXPERTS = ("", "expert_data")


class _Experts(FFNStrategy):
    """The common part of the expert layouts."""

    width_key = "parallel.etp"
    group_keys = "ep"

    def sizes(self, parallel: ParallelConfig, node: int, stage: int) -> tuple[int, int]:
        ep = parallel.ep or max(node // parallel.etp, 1)
        size = ep * parallel.etp
        require(
            size > 0 and size % node == 0 and stage % size == 0,
            f"parallel.{self.group_keys} = {size}: must be a multiple of parallel.node = {node} that divides the "
            f"{stage} ranks{'' if stage == node else ' of a stage'}; use one of {divisors(stage, node)}",
        )
        return ep, parallel.etp

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        divides("model.experts", model.experts, "parallel.ep", mesh.ep)
        if mesh.etp > 1:
            divides("model.ffn_hidden", model.ffn_hidden, self.width_key, mesh.etp)
            if any(spec.expert_bias for spec in model.layer_kinds):
                divides("model.hidden", model.hidden, self.width_key, mesh.etp)

    def rules(self, model: ModelConfig, layout: Layout) -> Rules:
        etp, mine = layout.etp, share(model.experts, layout.ep.size, layout.ep.index)

        def up(weight: Weight) -> Placement:
            whole = weight.shape
            if etp.size == 1:
                return rows(whole, [mine], EXPERTS)
            inputs = whole[2:]  # none of a bias
            ranges = stacked_shares(weight.outputs, etp.size, etp.index)
            boxes: tuple[Box, ...] = tuple(
                ((expert, part.start, *(0,) * len(inputs)), (1, len(part), *inputs))
                for expert in mine for part in ranges
            )  # fmt: skip
            return Placement(whole, (len(mine), sum(map(len, ranges)), *inputs), boxes, EXPERTS, cut="etp")

        def down(weight: Weight) -> Placement:
            whole = weight.shape
            if etp.size == 1:
                return rows(whole, [mine], EXPERTS)
            width = share(whole[-1], etp.size, etp.index)
            shape = (len(mine), *whole[1:-1], len(width))
            offset = (mine.start, *(0,) * (len(whole) - 2), width.start)
            return Placement(whole, shape, ((offset, shape),), EXPERTS, cut="etp")

        return {"ffn.experts.w13": up, "ffn.experts.b13": up, "ffn.experts.w2": down, "ffn.experts.b2": down}

    def ep_choices(self, node: int, stage: int, etp: int) -> Sequence[int]:
        widths = [width for width in range(node, stage + 1, node) if stage % width == 0]
        return [width // etp for width in widths if width % etp == 0]


class ExpertParallel(_Experts):
    """Experts over ranks by index; other FFNs whole on every rank."""

    name = "ep"
    title = "expert-parallel FFN"

    def sizes(self, parallel: ParallelConfig, node: int, stage: int) -> tuple[int, int]:
        require(parallel.etp == 1, f"parallel.etp = {parallel.etp} needs parallel.ffn = 'ep+tp'; with 'ep' use 1")
        return super().sizes(parallel, node, stage)

    def words(self, parallel: ParallelConfig) -> str:
        return f"ep {parallel.ep}"


class ExpertTensorParallel(_Experts):
    """Experts over ep ranks by index and over etp ranks by width; other FFNs whole on every rank."""

    name = "ep+tp"
    title = "expert- and tensor-parallel FFN"
    group_keys = "ep x parallel.etp"

    def etp_choices(self, machine: int) -> Sequence[int]:
        return [size for size in range(2, machine + 1) if machine % size == 0]

    def words(self, parallel: ParallelConfig) -> str:
        return f"ep {parallel.ep} x tp {parallel.etp}"


class TensorParallelFFN(_Experts):
    """Every FFN's width over the ranks of a node: experts, shared experts and dense layers."""

    name = "tp"
    title = "tensor-parallel FFN"
    width_key = "parallel.node"
    shares_width = True

    def asked(self, parallel: ParallelConfig) -> int:
        return 0

    def sizes(self, parallel: ParallelConfig, node: int, stage: int) -> tuple[int, int]:
        p = parallel
        require(
            p.dispatch != "all_to_all", "parallel.dispatch = 'all_to_all' with parallel.ffn = 'tp': use 'all_gather'"
        )
        require(p.ep in (0, 1), f"parallel.ep = {p.ep} with parallel.ffn = 'tp': use 1, or ffn = 'ep+tp' for both")
        require(
            p.etp in (1, node),
            f"parallel.etp = {p.etp} with parallel.ffn = 'tp': every rank of a node takes part, use {node}",
        )
        return 1, node

    def check(self, mesh: Mesh, parallel: ParallelConfig, model: ModelConfig) -> None:
        super().check(mesh, parallel, model)
        dense = model.dense_ffn_hidden if any(spec.dense for spec in model.layer_kinds) else 0
        divides("the width of the shared experts", model.shared_hidden, self.width_key, mesh.etp)
        divides("model.dense_ffn_hidden", dense, self.width_key, mesh.etp)

    def rules(self, model: ModelConfig, layout: Layout) -> Rules:
        experts = super().rules(model, layout)
        if layout.etp.size == 1:
            return experts
        up, down = tensor_rules(layout.etp.size, layout.etp.index)
        plain = {f"ffn.{kind}{name}.weight": rule for kind in ("", "shared.") for name, rule in
                 (("w13", up), ("w2", down))}  # fmt: skip
        return {**experts, **plain}

    def pays(self, node: int) -> bool:
        return node > 1

    def ep_choices(self, node: int, stage: int, etp: int) -> Sequence[int]:
        return [0]

    def words(self, parallel: ParallelConfig) -> str:
        return "tp"


EXPERT_PARALLEL, EXPERT_TENSOR_PARALLEL, TENSOR_PARALLEL_FFN = (
    ExpertParallel(), ExpertTensorParallel(), TensorParallelFFN(),
)  # fmt: skip

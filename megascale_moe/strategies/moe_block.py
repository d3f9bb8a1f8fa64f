"""`MoEBlock`: one layer as a plain `nn.Module` for anybody's model and training loop.

Inside, one autograd function runs the layer's operator list, so users of DDP, FSDP2 or their own loop get the same
operators, and the same communication if they pass axes, without our trainer. Parameters are ordinary parameters of
the module and their gradients reach autograd as usual, so hooks and wrappers see nothing special.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megascale_moe.comm.axis import Axes, single
from megascale_moe.config import ModelConfig
from megascale_moe.engine.executor import Program, resolve
from megascale_moe.engine.gradient import Gradient
from megascale_moe.engine.names import grad
from megascale_moe.engine.op import backward
from megascale_moe.engine.remat import kept_names
from megascale_moe.engine.value import Keep, Value
from megascale_moe.model.experts import MoE
from megascale_moe.model.rotary import rotary_table
from megascale_moe.model.segments import Segments
from megascale_moe.model.transformer import Block, initialise
from megascale_moe.model.weights import weights_of
from megascale_moe.strategies.layer import Layer
from megascale_moe.strategies.layout import Layout
from megascale_moe.strategies.model import block_ops
from megascale_moe.strategies.registry import strategies_of
from megascale_moe.strategies.slices import Slices


class MoEBlock(Block):
    """Norm, attention, norm, experts, with residual connections.

    With axes of several ranks the block holds its share of the experts and each rank passes its slice of every
    sequence; gradients of the other parameters must then be summed over those ranks, as for any replicated weight.

    Args:
        axes: from `megascale_moe.comm.axis.connect`; None: one rank.
        seed: initial weights are a function of it and of parameter names.
    """

    def __init__(self, config: ModelConfig, axes: Axes | None = None, dense: bool = False, seed: int = 0) -> None:
        config.check()
        with torch.device("meta"):
            super().__init__(config, config.spec_of(0, dense=dense))
        self.config, self.axes, self.spec = config, axes or single(), config.spec_of(0, dense=dense)
        ep = self.axes["ep"]
        if isinstance(self.ffn, MoE) and ep.size > 1:
            for name, stack in list(self.ffn.experts.named_parameters()):
                setattr(self.ffn.experts, name, nn.Parameter(stack.chunk(ep.size)[ep.index]))
        self.to_empty(device="cpu")
        weights, first = weights_of(self), ep.index * (config.experts // ep.size)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                initialise(f"layers.0.{name}", parameter, weights[name], config, seed, first)
            for buffer in self.buffers():
                buffer.zero_()
        self.programs = lru_cache(maxsize=8)(self._programs)

    def _programs(self, rows: int, length: int, dtype: torch.dtype) -> tuple[Program, Program, Slices]:
        layout = Layout(rows, length, self.axes, dtype)
        shape = (layout.tokens, self.config.hidden)
        x, y = (Value(name, shape, dtype, keep=Keep.FULL) for name in ("x", "y"))
        layer = Layer(self.config, layout, strategies_of(layout, self.config), self.spec)
        forward = block_ops(layer, x, y)
        auxiliary = [] if self.spec.dense or not (self.config.balance_loss or self.config.z_loss) else ["auxiliary"]
        back = backward(forward, [grad("y")])
        given = ("x", "rope", "segments")
        kept = kept_names(forward, back)
        seeds = (grad("y"), "auxiliary_scale")
        return (
            Program(forward, given, [*kept, "y", *auxiliary]),
            Program(back, [*given, *kept, *seeds], [grad("x")], consume=[*kept, *seeds]),
            layer.slices,
        )

    def forward(self, x: Tensor, segments: Segments | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """x [rows, tokens, hidden] -> (same shape, auxiliary loss as mean over this rank's tokens, float32 scalar).

        `tokens` is the whole sequence on one rank, this rank's slice of it on several. Add the auxiliary loss, already
        weighted by the config's coefficients, to the training loss.
        """
        rows, width, _ = x.shape
        length = width * self.axes["sequence"].size
        segments = segments or Segments.whole_rows(rows, length)
        y, auxiliary = _RunBlock.apply(self, segments, x, *self.parameters())  # type: ignore[no-untyped-call]
        return y, auxiliary


class _RunBlock(torch.autograd.Function):
    """Forward list in forward, backward list in backward."""

    @staticmethod
    def forward(ctx: Any, block: MoEBlock, segments: Segments, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        program, ctx.backward_program, slices = block.programs(segments.rows, segments.length, x.dtype)
        names = [name for name, _ in block.named_parameters()]
        weights = dict(zip(names, (p.detach() for p in parameters), strict=True)) | dict(block.named_buffers())
        positions = slices.take(segments.positions(), block.axes["sequence"].index)
        rope = rotary_table(block.config, positions.to(x.device))
        values = {"x": x.detach().flatten(0, 1), "rope": rope, "segments": segments}
        out = program.run(values, weights)
        ctx.weights, ctx.names, ctx.shape = weights, names, x.shape
        ctx.values = {name: resolve(out, name) for name in list(out)}
        auxiliary = ctx.values.get("auxiliary")
        tokens = x.shape[0] * x.shape[1]
        return (
            ctx.values["y"].view(x.shape),
            x.new_zeros((), dtype=torch.float32) if auxiliary is None else auxiliary.detach() / tokens,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dauxiliary: Tensor) -> tuple[Any, ...]:
        if ctx.values is None:
            raise RuntimeError("a second backward through the same MoEBlock: its activations are gone; run it again")
        program: Program = ctx.backward_program
        sinks = {name: Gradient(torch.empty_like(ctx.weights[name])) for name in ctx.names}
        tokens = ctx.shape[0] * ctx.shape[1]
        values = {name: ctx.values[name] for name in program.given if name in ctx.values}
        values |= {grad("y"): dy.flatten(0, 1).contiguous(), "auxiliary_scale": dauxiliary / tokens}
        ctx.values = None  # from here on the list drops each activation after its last reader
        dx = resolve(program.run(values, ctx.weights, sinks), grad("x"))
        gradients: Sequence[Tensor] = [sinks[name].value() for name in ctx.names]
        return (None, None, dx.view(ctx.shape), *gradients)

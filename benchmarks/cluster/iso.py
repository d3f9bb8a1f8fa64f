"""Link rates that give this machine's ranks the balance of an 8-GPU node: computation against communication.

An expert with SwiGLU computes 6 h h_ffn FLOP per token and exchanges 2 h elements (dispatch and combine), so

    R = (6 h h_ffn / flops) / (2 h itemsize / bandwidth) = 3 h_ffn bandwidth / (itemsize flops)

with bandwidth in bytes/s per direction. For BF16 that is the paper's 1.5 h_ffn bandwidth / peak. Equal R for equal
h_ffn means bandwidth = flops (bandwidth / peak of the node) (itemsize / 2): a rank that computes and sends FP32 moves
twice the bytes for the same FLOP, so its links are twice as fast per FLOP/s. Data sheet stands against data sheet:
what a node reaches of both is about the same share (H800: 160 of 200 GB/s, 0.80 of the peak in a good GEMM).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean

import torch
import torch.distributed as dist

from megascale_moe.testing import run_ranks
from megascale_moe.train.hardware import available_cores

ITEMSIZE = {"fp32": 4, "bf16": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GEMM = (512, 1024, 1024)
"""Tokens, inputs, outputs of the measured product."""


@dataclass(frozen=True)
class Node:
    """One GPU of an 8-GPU node: dense BF16 FLOP/s, bytes/s per direction over NVLink and over its share of the NICs."""

    peak: float
    nvlink: float
    nic: float


NODES = {
    "h800": Node(989e12, 200e9, 50e9),
    "h100": Node(989e12, 450e9, 50e9),
    "a100": Node(312e12, 300e9, 25e9),
    "h20": Node(148e12, 450e9, 50e9),
}


@dataclass(frozen=True)
class Balance:
    """Links that balance measured ranks as a node is: bits/s per rank and direction, and where they come from."""

    node: Node
    dtype: str
    flops: dict[str, float]
    intra: float
    inter: float

    def table(self, h_ffn: int) -> str:
        """The figures for people."""
        size, flops = ITEMSIZE[self.dtype], self.flops[self.dtype]
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in self.flops.items())
        lines = [f"GEMM, GFLOP/s per rank, all at once: {rates}; links for {self.dtype}"]
        for name, real, chosen in (("intra", self.node.nvlink, self.intra), ("inter", self.node.nic, self.inter)):
            lines.append(
                f"{name}  node {real / 1e9:g} GB/s, R = {ratio(h_ffn, real, self.node.peak, 2):.3f}   "
                f"cluster {chosen / 1e6:.1f} Mbit/s, R = {ratio(h_ffn, chosen / 8, flops, size):.3f}   (h_ffn {h_ffn})"
            )
        return "\n".join(lines)


def ratio(h_ffn: int, bandwidth: float, flops: float, itemsize: int) -> float:
    """R: time of an expert's computation over that of its communication; bytes/s and FLOP/s."""
    return 3 * h_ffn * bandwidth / (itemsize * flops)


def balance(node: Node, dtype: str, flops: dict[str, float], width: float = 1.0) -> Balance:
    """The links for ranks that compute with `flops` (FLOP/s by dtype), to 0.1 Mbit/s.

    Args:
        width: of the real model's experts over those of a copy, whose R is that much smaller on equal links.
    """
    intra, inter = (
        round(width * flops[dtype] * bytes_s / node.peak * ITEMSIZE[dtype] / 2 * 8, -5)
        for bytes_s in (node.nvlink, node.nic)
    )
    return Balance(node, dtype, flops, intra, inter)


def gemm_rates(ranks: int, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of a rank in a matrix product by dtype, all ranks at once with one thread each; mean over ranks.

    By CPU time, times the share of a core that a rank has: other processes of the machine do not make its links slower.
    """
    found = run_ranks(ranks, _rank_rates, seconds)
    share = min(1.0, available_cores() / ranks)
    return {name: share * mean(rates[name] for rates in found) for name in DTYPES}


def _rank_rates(seconds: float) -> dict[str, float]:
    """FLOP per CPU second of this rank, by dtype."""
    tokens, inputs, outputs = GEMM
    rates = {}
    for name, dtype in DTYPES.items():
        x, w = torch.randn(tokens, inputs).to(dtype), torch.randn(inputs, outputs).to(dtype)
        torch.mm(x, w)
        dist.barrier()
        end = time.perf_counter() + seconds
        start, count = time.process_time(), 0
        while time.perf_counter() < end:
            torch.mm(x, w)
            count += 1
        rates[name] = count * 2 * tokens * inputs * outputs / (time.process_time() - start)
    return rates

"""Helpers for tests of several ranks: run a function on forked ranks and collect what it returns."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from typing import Any

from megascale_moe.comm.local_ranks import fork_ranks


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; returns the results in rank order.

    Raises:
        AssertionError: a rank raised; carries its traceback.
    """
    results: Any = multiprocessing.get_context("fork").SimpleQueue()

    def call(rank: int) -> None:
        try:
            outcome = (rank, function(*args), "")
        except BaseException:
            results.put(pickle.dumps((rank, None, traceback.format_exc())))
            raise SystemExit(1) from None
        results.put(pickle.dumps(outcome))  # plain bytes: torch's own queue would share memory that dies with the rank

    collected: dict[int, tuple[Any, str]] = {}

    def drain() -> None:
        while not results.empty():
            rank, value, error = pickle.loads(results.get())
            collected[rank] = (value, error)

    status = fork_ranks(world, call, timeout=timeout, poll=drain)
    drain()
    errors = [f"rank {rank}:\n{error}" for rank, (_, error) in sorted(collected.items()) if error]
    assert not errors and status == 0, "\n".join(errors) or f"a rank ended with status {status}"
    return [collected[rank][0] for rank in range(world)]

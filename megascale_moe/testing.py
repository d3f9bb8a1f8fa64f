"""Helpers for tests of several ranks: run a function on forked ranks and collect what it returns."""

from __future__ import annotations

import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale_moe.comm.local_ranks import fork_ranks


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(*args)` on every rank of a gloo group; returns the results in rank order.

    Results come back as files: a pipe fills up, and a rank that is ended while it writes to one leaves half a message
    for which this process would wait for ever.

    Raises:
        AssertionError: a rank raised; carries its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="megascale-") as name:
        folder = Path(name)

        def call(rank: int) -> None:
            try:
                result = pickle.dumps(function(*args))
            except BaseException:
                (folder / f"error-{rank}").write_text(traceback.format_exc(), encoding="utf-8")
                raise SystemExit(1) from None
            (folder / f"result-{rank}").write_bytes(result)

        status = fork_ranks(world, call, timeout=timeout)
        errors = [f"{path.name}:\n{path.read_text(encoding='utf-8')}" for path in sorted(folder.glob("error-*"))]
        if errors or status:
            raise AssertionError("\n".join(errors) or f"a rank ended with status {status}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world)]

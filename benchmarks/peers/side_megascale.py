"""Side `megascale`: our own library. A placeholder until the package can train.

To complete: build the model of `case.CASE` with `megascale_moe`, load `read_weights(job.folder)` (Mixtral
naming), pick the layout for `job.ranks` (1: one process with `job.threads` threads; 2: expert parallel 2,
data parallel 2 for the rest), BF16 compute over FP32 weights and optimizer state if `job.bf16`, and return a
function that runs one step on this rank's sequences: forward, backward, clip, AdamW. The gloo group exists.
It returns the mean loss over this rank's tokens, detached; hyper-parameters are in CASE.
"""

import importlib.util

from protocol import Job, Step, serve


def build(job: Job) -> Step:
    if importlib.util.find_spec("megascale_moe") is None:
        raise RuntimeError("megascale_moe is not installed in the environment that runs the driver")
    raise NotImplementedError("side_megascale.build is still a placeholder")


if __name__ == "__main__":
    serve(build)

"""Side `plain`: the loop-over-experts decoder of plain.py, alone or under DistributedDataParallel."""

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from case import read_weights
from plain import Decoder
from protocol import Job, Step, serve
from training import Master, Plain, next_token_loss


def build(job: Job) -> Step:
    model = Decoder(job.case)
    model.load_state_dict(read_weights(job.folder))
    model.to(job.device)
    autocast = job.bf16 and "--autocast" in job.options
    updater = Master(model, job.case) if job.bf16 and not autocast else Plain(model, job.case)
    network = DistributedDataParallel(model) if job.ranks > 1 else model

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=autocast):
            logits = network(inputs)
        loss = next_token_loss(logits, targets)
        loss.backward()
        updater.update()
        return loss.detach()

    return step


if __name__ == "__main__":
    serve(build)

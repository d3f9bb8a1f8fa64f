"""A little generated text at the end of a run: the quickest sign that a model learned something."""

from __future__ import annotations

import torch

from megascale_moe.train.trainer import Trainer


def generate(trainer: Trainer, prompt: list[int], count: int, end: int, temperature: float = 0.7) -> list[int]:
    """Continue `prompt` by up to `count` tokens; all ranks call it together and get the same result.

    The whole sequence is run again for every token: no cache, so that text comes from the very lists that train.
    """
    generator = torch.Generator().manual_seed(trainer.config.train.seed)
    tokens = list(prompt)
    for _ in range(count):
        if len(tokens) >= trainer.model.sequence_length:
            break
        probabilities = (trainer.next_token_logits(tokens) / temperature).softmax(-1)
        if not probabilities.isfinite().all():  # training diverged, which the losses say
            break
        token = int(torch.multinomial(probabilities, 1, generator=generator))
        if token == end:
            break
        tokens.append(token)
    return tokens[len(prompt) :]

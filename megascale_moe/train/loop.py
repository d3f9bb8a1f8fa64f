"""The training loop of one rank: data in, updates, evaluations, checkpoints, metrics, a sample at the end.

Order of things matters for what survives a kill: metrics of a step are flushed before its checkpoint is written, and
the checkpoint holds everything the next step depends on, so a resumed run repeats the lost steps bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megascale_moe.checkpoint import Checkpoint, latest, save
from megascale_moe.comm.local_ranks import on_all_processors
from megascale_moe.comm.mesh import Mesh
from megascale_moe.config import Config, ConfigError, require, to_toml
from megascale_moe.data import (
    Corpus,
    HeldOutRows,
    Loader,
    Split,
    micro_batches,
    open_corpus,
    prepare,
    split_corpus,
)
from megascale_moe.engine.executor import Observer
from megascale_moe.engine.trace import Event, Trace, now
from megascale_moe.model.counts import counts
from megascale_moe.pipeline.batches import DTYPES, check_batches, micro_batch
from megascale_moe.train.hardware import peak_flops, peak_memory
from megascale_moe.train.job import Job
from megascale_moe.train.metrics import FILE, StepMetrics, metrics_writer, read_metrics
from megascale_moe.train.progress import counted_progress
from megascale_moe.train.timeline import TIMELINE, WHOLE, Watch, document, measured, step_of
from megascale_moe.train.trainer import StepResult, Trainer

RECENT = 3
"""Last steps from whose traces the report's times are taken, where the first steps have not measured them."""


@dataclass(frozen=True)
class TrainOutcome:
    """The results of a finished run (the --json document)."""

    step: int
    loss: float | None
    eval_loss: float | None
    tokens_per_s: float | None
    folder: str
    sample: str


def check_before_start(config: Config, mesh: Mesh) -> Path | None:
    """Refuse all that can be refused without starting ranks; return the checkpoint to resume from, if any.

    Raises:
        ConfigError: batch sizes that do not divide, a run folder that cannot be written or already holds a run, a
            checkpoint that does not exist.
    """
    check_batches(config, mesh)
    folder = Path(config.run.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        message = f"run.folder = {str(folder)!r} cannot be written ({error.strerror}); choose another"
        raise ConfigError(message) from error
    if config.run.resume and config.run.resume != "auto":
        path = Path(config.run.resume)
        Checkpoint(path)  # refuses what is no checkpoint
        return path
    newest = latest(folder / "checkpoints")
    require(
        newest is None or bool(config.run.resume),
        f"run.folder = {str(folder)!r} already holds {newest.name if newest else ''}: "
        "continue it with --resume or choose another folder",
    )
    return newest


def open_data(config: Config, job: Job) -> tuple[Corpus, Split, Split]:
    """Prepare the corpus once per node, then open it on every rank: (corpus, training, validation)."""
    d, vocab = config.data, config.model.vocab

    def work() -> str:
        with counted_progress(shown=job.leads) as update, on_all_processors():
            progress = partial(update, "preparing the corpus")
            prepared = prepare(
                d.path, vocab=vocab, tokenizer=d.tokenizer, text_field=d.text_field, cache=d.cache, progress=progress
            )
            return str(prepared)

    folder = Path(job.on_each_node(work))
    # One rank of a node reads and checks every token id; the others trust it.
    corpus = job.together(lambda: open_corpus(folder, vocab if job.local_rank == 0 else None))
    training, validation = job.together(lambda: split_corpus(corpus, d.validation_fraction, config.train.seed))
    return corpus, training, validation


def train(config: Config, mesh: Mesh, job: Job, resume: Path | None) -> TrainOutcome:
    """Train to the end; every rank calls it.

    Raises:
        ConfigError: the data or the checkpoint does not fit; nothing was written then.
    """
    corpus, training, held_out = open_data(config, job)
    loop = job.together(lambda: Loop(config, mesh, job, training, held_out))
    if resume is None:
        loop.trainer.initialise()
    else:
        job.together(lambda: loop.resume(resume))
    loop.run()
    loop.write_timeline()
    metrics = Path(config.run.folder) / FILE
    last: dict[str, Any] = {}
    if loop.last is not None:
        last = loop.last.record()
    elif metrics.exists():  # of a run that was resumed at its end
        last = (read_metrics(metrics) or [{}])[-1]
    return TrainOutcome(
        step=loop.trainer.steps,
        loss=last.get("loss"),
        eval_loss=last.get("eval_loss"),
        tokens_per_s=last.get("tokens_per_s"),
        folder=config.run.folder,
        sample=loop.sample(corpus),
    )


class Loop:
    """State of the loop around a `Trainer`."""

    def __init__(self, config: Config, mesh: Mesh, job: Job, training: Split, held_out: Split) -> None:
        self.config, self.mesh, self.job, self.held_out = config, mesh, job, held_out
        self.trainer = Trainer(config, mesh, job.axes, job.device)
        t, m = config.train, config.model
        self.micro = micro_batch(config, mesh)
        self.micros = t.global_batch // mesh.dp // self.micro
        order = {
            "sequence_length": m.sequence_length, "dp_rank": mesh.replica(job.rank), "dp_size": mesh.dp,
            "seed": t.seed,
        }  # fmt: skip
        self.loader = Loader(training, global_batch=t.global_batch, **order)
        micro = min(self.micro, -(-t.eval_rows // mesh.dp))
        self.validation = HeldOutRows(held_out, rows=t.eval_rows, micro_batch=micro, **order) if t.eval_rows else None
        self.flops_per_token = counts(m).flops_per_token
        self.peak = peak_flops(job.device, DTYPES[t.dtype], mesh.world) if job.leads else None
        self.last: StepMetrics | None = None
        self.watch: Watch | None = None
        self.recent: list[list[Event]] = []  # of the last steps, on the rank that writes

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint, of this layout or another."""
        checkpoint = Checkpoint(path)
        self.loader.load_state_dict(checkpoint.extra["loader"])
        self.trainer.load(checkpoint)
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(checkpoint.extra["random_state"]), dtype=torch.uint8))

    def run(self) -> None:
        """Do all remaining steps; a run that is at its end stays as it is."""
        folder, t, run = Path(self.config.run.folder), self.config.train, self.config.run
        if self.trainer.steps >= t.steps:
            return
        with contextlib.ExitStack() as stack:
            write = None
            if self.job.leads:
                (folder / "config.toml").write_text(to_toml(self.config), encoding="utf-8")
                write = stack.enter_context(
                    metrics_writer(folder, steps=t.steps, start=self.trainer.steps, log_every=run.log_every)
                )
            traces = Trace()
            while self.trainer.steps < t.steps:
                watch = self._watch() if write else None
                result, seconds = self._step(watch.observe if watch else None)
                step = self.trainer.steps
                if step > t.steps - run.trace_steps:
                    traces.events += result.trace.events
                if watch:
                    self.watch = watch
                elif write and step > t.steps - RECENT:
                    self.recent.append(result.trace.events)
                eval_loss = self.evaluate() if self._due(t.eval_every) else None
                self.last = self._metrics(result, seconds, eval_loss)
                if write:
                    write(self.last)
                if self._due(t.checkpoint_every):
                    self.save()
            if run.trace_steps:
                traces.write_chrome(folder / f"trace-rank-{self.job.rank}.json", self.job.rank)

    def _due(self, every: int) -> bool:
        step = self.trainer.steps
        return step == self.config.train.steps or (every > 0 and step % every == 0)

    def _step(self, observe: Observer | None) -> tuple[StepResult, float]:
        start = now()
        step = self.loader.next_step()
        result = self.trainer.step(micro_batches(step.rows, self.micro), step.target_count, observe)
        return result, now() - start

    def evaluate(self) -> float | None:
        """Return the mean loss on the held-out rows, the same on every rank and for every layout."""
        if self.validation is None:
            return None
        return self.trainer.evaluate(self.validation, self.validation.target_count)

    def _metrics(self, result: StepResult, seconds: float, eval_loss: float | None) -> StepMetrics:
        tokens = self.config.train.global_batch * self.config.model.sequence_length
        flops = tokens / seconds * self.flops_per_token / self.mesh.world
        trace, load = result.trace, result.load.double()
        return StepMetrics(
            step=self.trainer.steps,
            loss=result.loss,
            aux_loss=result.auxiliary,
            grad_norm=result.grad_norm,
            lr=result.learning_rate,
            tokens_per_s=tokens / seconds,
            tflops=flops / 1e12,
            mfu=flops / self.peak if self.peak else 0.0,
            step_s=seconds,
            comm_s=trace.communication,
            exposed_comm_s=trace.exposed,
            wire_bytes=sum(trace.wire_bytes().values()),
            peak_memory_bytes=peak_memory(self.job.device),
            expert_load=tuple((load.amax(1) / load.mean(1)).tolist()) if load.numel() else (),
            eval_loss=eval_loss,
        )

    def _watch(self) -> Watch | None:
        """Return what looks at the memory of the coming step, if it is the one for that: late, but not the last."""
        trainer, steps = self.trainer, self.config.train.steps
        late = steps - RECENT <= trainer.steps + 1 < steps
        if not late or self.watch is not None or trainer.profiler is not None:
            return None
        _, program = trainer.program(self.micro, self.micros, "train")
        return Watch(trainer) if len(program.ops) <= WHOLE else None

    def write_timeline(self) -> None:
        """Leave what the report draws of a step: the rank's list, and how long its operators took."""
        if not self.recent:
            return
        step = step_of(self.trainer, self.micro, self.micros, self.recent)
        timeline = document(step, self.mesh, self.job.rank)
        if self.watch is not None:
            timeline["memory"] = self.watch.memory(self.trainer, step.plan)
        last = self.recent[-1]
        timeline["measured"] = measured(last, last[0].start)
        path = Path(self.config.run.folder) / TIMELINE
        path.write_text(json.dumps(timeline, allow_nan=False), encoding="utf-8")

    def save(self) -> None:
        """Write a checkpoint; all ranks together."""
        extra: dict[str, Any] = {
            "loader": dict(self.loader.state_dict()),
            "config": asdict(self.config),
            "random_state": torch.get_rng_state().numpy().tobytes().hex(),
        }
        save(
            Path(self.config.run.folder) / "checkpoints",
            self.trainer.steps,
            self.trainer.pieces(),
            extra,
            rank=self.job.rank,
            world=self.job.world,
            barrier=self.job.barrier,
            keep=self.config.train.keep_checkpoints,
        )

    def sample(self, corpus: Corpus) -> str:
        """Return a held-out beginning and its continuation by the model."""
        count, tokenizer = self.config.train.sample_tokens, corpus.tokenizer
        if not count:
            return ""
        document = int(self.held_out.documents[0])
        beginning = corpus.read(document, 0, min(16, int(corpus.lengths[document]) - 1))
        prompt = [int(token) for token in beginning][-self.config.model.sequence_length // 2 :]
        return tokenizer.decode([*prompt, *self.trainer.generate(prompt, count, tokenizer.eos)])

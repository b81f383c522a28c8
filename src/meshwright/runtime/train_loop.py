"""The loop of a training run: data, steps, validation, checkpoints, and what ends it."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.errors import JobError
from meshwright.parallel.layout import to_text
from meshwright.runtime.checkpoint import Checkpointer, complete_checkpoints, load_checkpoint
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.data import Samples
from meshwright.runtime.data_sources import open_samples, open_valid_samples, split_weight
from meshwright.runtime.data_text import is_dataset, write_corpora
from meshwright.runtime.engine import Engine
from meshwright.runtime.train_log import Log, memory_bytes
from meshwright.runtime.train_settings import ProfileSettings, TrainReport, TrainSettings
from meshwright.runtime.weights import load_weights, save_weights

WSD_DECAY_FRACTION = 0.1
"""Of a warm-up, stable, decay schedule, the part of the steps that decays (arXiv:2404.06395)."""
MOST_SKIPPED_STEPS = 5
"""Steps in a row whose gradient is not finite before the run ends."""


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then the chosen decay.

    cosine: min + (lr - min) (1 + cos(pi t)) / 2 with t the part of the decay done;
    wsd: constant, then linear over the last tenth of the steps (arXiv:2404.06395).
    """
    lr, low = settings.optimizer.lr, settings.min_lr
    if step < settings.warmup_steps:
        return lr * (step + 1) / settings.warmup_steps
    whole = max(1, settings.steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / whole)
    match settings.decay:
        case "constant":
            return lr
        case "linear":
            return low + (lr - low) * (1 - done)
        case "cosine":
            return low + (lr - low) * (1 + math.cos(math.pi * done)) / 2
        case _:
            left = min(1.0, (1 - done) / WSD_DECAY_FRACTION)
            return low + (lr - low) * left


class Run:
    """The loop and what it carries from step to step."""

    def __init__(
        self, settings: TrainSettings, engine: Engine, log: Log, signalled: Callable[[], bool]
    ) -> None:
        self.settings, self.engine, self.log, self.signalled = settings, engine, log, signalled
        self.step, self.seen, self.skipped = 0, 0, 0
        self.losses: list[float] = []
        self.valid_losses: dict[int, float] = {}
        self.checkpointer: Checkpointer | None = None
        self.saved: Path | None = None
        self._open_data()
        if settings.checkpoints is not None:
            self.checkpointer = Checkpointer(Path(settings.checkpoints), engine, keep=settings.keep)
        self._start()
        self.first = self.step

    def _open_data(self) -> None:
        settings = self.settings
        prepare_data(settings, self.engine, self.log)
        sizes = {"seq_len": settings.seq_len, "vocab_size": settings.shape.vocab_size}
        self.samples = open_samples(settings.data, seed=settings.seed, **sizes)
        self.valid: Samples | None = None
        if settings.valid_every:
            self.valid = open_valid_samples(settings.data, seed=settings.seed, **sizes)

    def _start(self) -> None:
        settings = self.settings
        folder = settings.checkpoints
        found = complete_checkpoints(Path(folder)) if folder is not None else []
        if found:
            state = load_checkpoint(self.engine, found[-1])
            self.step, self.seen, self.saved = state["step"], state["samples"], found[-1]
            self.log.say(f"resumed from {found[-1]} after step {self.step}")
            for key, now in _lasting(settings).items():
                if key in state and state[key] != now:
                    self.log.say(f"note: {key} was {state[key]} and is now {now}")
            if self.step >= settings.steps:
                self.log.say(f"nothing is left to do: {settings.steps} steps were asked for")
        elif settings.weights is not None:
            load_weights(self.engine, Path(settings.weights))
            self.log.say(f"weights from {settings.weights}")

    def run(self) -> TrainReport:
        """Train until the last step or a signal; save what is not saved."""
        settings, stopped = self.settings, False
        with _profiler(settings.profile, self.engine.context.groups.rank, self.step) as tick:
            while self.step < settings.steps and not stopped:
                stopped = self._one_step()
                tick()
                self._validate()
                if settings.save_every and self.step % settings.save_every == 0:
                    self._save()
        if self.checkpointer is not None:
            if self.step > self.first and self.saved != self.checkpointer.path(self.step):
                self._save()
            self.checkpointer.wait()
        if settings.save_weights is not None:
            save_weights(self.engine, Path(settings.save_weights), settings.config)
            self.log.say(f"weights written to {settings.save_weights}")
        if stopped:
            where = f", saved to {self.saved}" if self.saved is not None else ", not saved"
            self.log.say(f"stopped by a signal after step {self.step}{where}")
        return TrainReport(
            rank=self.engine.context.groups.rank,
            first=self.first,
            step=self.step,
            losses=self.losses,
            valid_losses=self.valid_losses,
            stopped=stopped,
            checkpoint=None if self.saved is None else str(self.saved),
            assumed=settings.assumed,
        )

    def _one_step(self) -> bool:
        """Train on a global batch; return whether a rank was told to stop."""
        start_s = time.perf_counter()
        lr = learning_rate(self.settings, self.step)
        rows = own_samples(self.engine, self.samples, self.seen)
        result = self.engine.step(rows.to(self.engine.settings.device), lr=lr)
        signalled, failed, peak_bytes = self._agree()
        counts = self.engine.expert_tokens() if self.settings.metrics is not None else {}
        self.step += 1
        self.seen += self.settings.gbs
        self.losses.append(result.loss)
        self.skipped = 0 if result.updated else self.skipped + 1
        self.log.step(
            self.step,
            result,
            lr=lr,
            samples=self.seen,
            step_s=time.perf_counter() - start_s,
            peak_bytes=peak_bytes,
            expert_tokens={name: found.int().tolist() for name, found in counts.items()},
        )
        if failed and self.checkpointer is not None:
            self.checkpointer.wait()
        if self.skipped >= MOST_SKIPPED_STEPS:
            raise JobError(
                "train.loss",
                result.loss,
                f"The gradient was not finite in {self.skipped} steps in a row, the last of them "
                f"step {self.step}; no weight was changed by them.",
                "Lower the learning rate, or resume from an earlier checkpoint.",
            )
        return signalled

    def _agree(self) -> tuple[bool, bool, int]:
        """Return what holds for any rank: a signal, a failed save; and the most memory."""
        device = self.engine.settings.device
        failed = self.checkpointer is not None and self.checkpointer.failure is not None
        own = [float(self.signalled()), float(failed), float(memory_bytes(device))]
        told = torch.tensor(own, dtype=torch.float64, device=device)
        most = all_reduce(told, self.engine.context.groups.world, dist.ReduceOp.MAX).tolist()
        return bool(most[0]), bool(most[1]), int(most[2])

    def _validate(self) -> None:
        settings = self.settings
        if self.valid is None or self.step % settings.valid_every:
            return
        start_s = time.perf_counter()
        losses: list[float] = []
        for batch in range(settings.valid_batches):
            rows = own_samples(self.engine, self.valid, batch * settings.gbs)
            losses.append(self.engine.evaluate(rows.to(self.engine.settings.device))[0])
        loss = sum(losses) / len(losses)
        self.valid_losses[self.step] = loss
        self.log.valid(self.step, loss, time.perf_counter() - start_s)

    def _save(self) -> None:
        assert self.checkpointer is not None
        state = {
            "step": self.step,
            "samples": self.seen,
            "optimizer_steps": self.engine.optimizer.steps,
            "layout": to_text(self.settings.layout),
            **_lasting(self.settings),
        }
        self.saved = self.checkpointer.save(self.step, state)


def _lasting(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings that decide which samples a step sees."""
    return {
        "seed": settings.seed,
        "seq_len": settings.seq_len,
        "gbs": settings.gbs,
        "data": list(settings.data.sources),
    }


def own_samples(engine: Engine, samples: Samples, first: int) -> Tensor:
    """Return this rank's rows of the global batch that begins with sample ``first``."""
    numbers = engine.own_rows(torch.arange(first, first + engine.settings.gbs))
    return torch.from_numpy(np.stack([samples.sample(int(n)) for n in numbers]))


def prepare_data(settings: TrainSettings, engine: Engine, log: Log) -> None:
    """Tokenize datasets that are not in the cache: rank 0 first, then one rank of each other node.

    However long that takes, no rank waits in one collective: all of them meet after every batch
    of rows.
    """
    sources = [split_weight(s)[1] for s in (*settings.data.sources, *settings.data.valid)]
    texts = tuple(source for source in sources if is_dataset(source))
    if not texts:
        return
    rank = engine.context.groups.rank
    for works in (rank == 0, os.environ.get("LOCAL_RANK", str(rank)) == "0"):
        work = write_corpora(settings.data, texts) if works else iter(())
        while True:
            told = next(work, None)
            if told is not None:
                log.say(told, passing=True)
            busy = torch.tensor(float(told is not None), device=engine.settings.device)
            if not all_reduce(busy, engine.context.groups.world, dist.ReduceOp.MAX):
                break


@contextmanager
def _profiler(
    settings: ProfileSettings | None, rank: int, done: int
) -> Generator[Callable[[], object], None, None]:
    """Trace the wanted steps, of which ``done`` were made by an earlier run."""
    if settings is None or rank not in settings.ranks or settings.steps[1] <= done:
        yield lambda: None
        return
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    first, last = max(1, settings.steps[0] - done), settings.steps[1] - done

    def write(profile: Any) -> None:
        profile.export_chrome_trace(str(folder / f"rank{rank}.json"))

    schedule = torch.profiler.schedule(
        wait=max(0, first - 2), warmup=min(1, first - 1), active=last - first + 1, repeat=1
    )
    # There is one cycle of steps; torch 2.11 warns that the next one would clear its events.
    with torch.profiler.profile(
        schedule=schedule, on_trace_ready=write, acc_events=True
    ) as profile:
        yield profile.step

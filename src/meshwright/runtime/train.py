"""A trainer: settings are checked, ranks meet, signals are caught; then the loop runs."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
from __future__ import annotations

import hashlib
import math
import os
import signal
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from meshwright.describe.gpu import load_gpu
from meshwright.errors import ClusterError, DocumentError, JobError, LaunchError
from meshwright.parallel.layout import to_text
from meshwright.runtime.compiled import check_compilable
from meshwright.runtime.data_sources import check_data
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import join_torchrun, under_torchrun
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.train_log import Log
from meshwright.runtime.train_loop import Run
from meshwright.runtime.train_settings import DECAYS, DTYPES, TrainReport, TrainSettings


def check_settings(settings: TrainSettings) -> None:
    """Raise a ``MeshwrightError`` for settings that cannot be trained."""
    _check_numbers(settings)
    if settings.dtype not in DTYPES:
        raise JobError("train.dtype", settings.dtype, "Unknown.", f"Use {' or '.join(DTYPES)}.")
    if not 0 <= settings.shape.lora_rank <= settings.shape.hidden_size:
        rank, most = settings.shape.lora_rank, settings.shape.hidden_size
        raise JobError("train.lora_rank", rank, f"It lies from 0 to {most}.", "Use 16.")
    if settings.decay not in DECAYS:
        raise JobError("train.decay", settings.decay, "Unknown.", f"Use {' or '.join(DECAYS)}.")
    if settings.save_every and settings.checkpoints is None:
        rule = "Saving needs a folder."
        raise JobError("train.save_every", settings.save_every, rule, "Give checkpoints.")
    check_data(settings.data)
    _check_profile(settings)
    check_runnable(settings.shape, settings.layout, seq_len=settings.seq_len, gbs=settings.gbs)
    if settings.compile:
        check_compilable(settings.layout, settings.compile)


def _check_numbers(settings: TrainSettings) -> None:
    least = {
        "seed": 0,
        "steps": 1,
        "log_every": 1,
        "valid_batches": 1,
        "warmup_steps": 0,
        "save_every": 0,
        "valid_every": 0,
        "keep": 0,
    }
    for name, low in least.items():
        value = getattr(settings, name)
        if value < low:
            raise JobError(f"train.{name}", value, f"It is at least {low}.", f"Use {low}.")
    given = settings.optimizer
    for name, value in (
        ("lr", given.lr),
        ("min_lr", settings.min_lr),
        ("weight_decay", given.weight_decay),
        ("clip_norm", given.clip_norm),
    ):
        if not 0 <= value < math.inf:
            raise JobError(f"train.{name}", value, "It is a finite number, 0 or more.", "Use 0.")
    if settings.min_lr > given.lr and settings.decay != "constant":
        rule = f"The rate falls from lr = {given.lr:g} to it."
        raise JobError("train.min_lr", settings.min_lr, rule, f"Use {given.lr:g} or less.")
    alpha = settings.shape.lora_alpha
    if settings.shape.lora_rank and not 0 < alpha < math.inf:
        raise JobError("train.lora_alpha", alpha, "It is a finite number above 0.", "Use 16.")


def _check_profile(settings: TrainSettings) -> None:
    profile = settings.profile
    if profile is None:
        return
    world, (first, last) = settings.layout.world_size, profile.steps
    if any(not 0 <= rank < world for rank in profile.ranks):
        shown = ",".join(map(str, profile.ranks))
        rule = f"The layout has ranks 0 to {world - 1}."
        raise JobError("train.profile_ranks", shown, rule, "Use 0.")
    if not 1 <= first <= last <= settings.steps:
        rule = f"A first and a last step, from 1 to {settings.steps}."
        remedy = f"Use 1-{min(3, settings.steps)}."
        raise JobError("train.profile_steps", f"{first}-{last}", rule, remedy)


def train(settings: TrainSettings) -> TrainReport:
    """Train, in this process or as one rank of torchrun.

    SIGTERM and SIGINT end the run after the step under way, with a checkpoint.

    Raises ``LaunchError`` for a wrong world or ranks that were told different things,
    ``DocumentError`` for damaged data or checkpoints and files that cannot be written, ``JobError``
    for impossible settings and for a gradient that stays not finite.
    """
    check_settings(settings)
    with join_torchrun(settings.layout.world_size, settings.timeout_s) as rank:
        try:
            return train_rank(rank, settings)
        except OSError as error:
            rule = f"{error.strerror or error}."
            remedy = "Free space, or name another path."
            raise DocumentError("file", str(error.filename), rule, remedy) from None


def train_rank(rank: int, settings: TrainSettings) -> TrainReport:
    """Train as one rank of a world that has already met."""
    _check_same_settings(settings)
    _check_folders(rank, settings)
    device = _device()
    engine = Engine(
        settings.shape,
        settings.layout,
        Settings(
            seq_len=settings.seq_len,
            gbs=settings.gbs,
            dtype=DTYPES[settings.dtype],
            seed=settings.seed,
            execution=settings.execution,
            compile=settings.compile,
            optimizer=settings.optimizer,
            device=device,
        ),
        rank=rank,
    )
    settings = replace(settings, peak_flops_per_s=_peak_flops_per_s(settings, device))
    with Log(settings, engine) as log, _stop_signals(log) as signalled:
        return Run(settings, engine, log, signalled).run()


def _check_folders(rank: int, settings: TrainSettings) -> None:
    """Raise ``DocumentError`` now for a folder that could not be written at the end."""
    if rank:
        return
    for name in ("checkpoints", "save_weights"):
        folder = getattr(settings, name)
        if folder is None:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            rule = f"It could not be written: {error.strerror or error}."
            raise DocumentError(f"train.{name}", folder, rule, "Name another folder.") from None


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _peak_flops_per_s(settings: TrainSettings, device: torch.device) -> float:
    """Return the matmul rate of the GPU's data sheet; 0 on a CPU or where it is not known."""
    if settings.peak_flops_per_s or device.type != "cuda":
        return settings.peak_flops_per_s
    try:
        gpu = load_gpu(torch.cuda.get_device_name(device))
    except ClusterError:
        return 0.0
    return gpu.peak_flops_per_s.get(settings.dtype, 0.0)


def _check_same_settings(settings: TrainSettings) -> None:
    """Raise ``LaunchError`` naming the ranks whose settings differ from those of rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    told = {k: repr(v) for k, v in asdict(settings).items() if k != "layout"}
    told["layout"] = to_text(settings.layout)
    own = {k: hashlib.sha256(v.encode()).hexdigest() for k, v in told.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    odd = [rank for rank, digests in enumerate(everyone) if digests != everyone[0]]
    if odd:
        names = sorted({k for rank in odd for k in own if everyone[rank][k] != everyone[0][k]})
        raise LaunchError(
            "rank",
            ", ".join(map(str, odd)),
            f"Its settings differ from those of rank 0: {', '.join(names)}.",
            "Start every rank with the same command.",
        )


@contextmanager
def _stop_signals(log: Log) -> Generator[Callable[[], bool], None, None]:
    """Turn SIGTERM and Ctrl-C into a wish to stop; a second Ctrl-C ends a lone process at once.

    Under torchrun a single Ctrl-C arrives twice, from the terminal and from torchrun.
    """
    told = False
    before: dict[int, Any] = {}

    def tell(number: int, frame: object) -> None:
        nonlocal told
        if log.speaks and not told:
            os.write(2, b"\nstopping after this step\n")
        told = True
        if not under_torchrun():
            signal.signal(signal.SIGINT, before[signal.SIGINT])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, tell)
    try:
        yield lambda: told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

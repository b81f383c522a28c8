"""The command that trains: train."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated

import typer

from meshwright.cli.planning import AsJson, ModelText


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(train)


def train(
    model: ModelText,
    layout: Annotated[
        str, typer.Option("--layout", help='Degrees and choices, such as "tp=2 pp=2".')
    ] = "",
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens of a sequence.")] = 1024,
    gbs: Annotated[
        int, typer.Option("--global-batch-size", help="Sequences of an optimizer step.")
    ] = 8,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 100,
    data: Annotated[
        str, typer.Option("--data", help="mock, or the path prefix of a .bin/.idx corpus.")
    ] = "mock",
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, bf16 (float32 master weights) or fp64.")
    ] = "fp32",
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 3e-4,
    min_lr: Annotated[float, typer.Option("--min-lr", help="Learning rate at the end.")] = 0.0,
    decay: Annotated[
        str, typer.Option("--decay", help="constant, linear, cosine or wsd.")
    ] = "cosine",
    warmup_steps: Annotated[int, typer.Option("--warmup-steps")] = 0,
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.1,
    clip_norm: Annotated[float, typer.Option("--clip-norm", help="0: no clipping.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed")] = 1234,
    checkpoints: Annotated[
        str | None, typer.Option("--checkpoints", help="Folder to save to and to resume from.")
    ] = None,
    save_every: Annotated[
        int, typer.Option("--save-every", help="Steps between checkpoints; 0: at the end.")
    ] = 0,
    keep: Annotated[int, typer.Option("--keep", help="Newest checkpoints kept; 0: all.")] = 0,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Hugging Face folder to start from.")
    ] = None,
    lora_rank: Annotated[
        int, typer.Option("--lora-rank", help="Train low-rank changes alone; 0: all weights.")
    ] = 0,
    lora_alpha: Annotated[float, typer.Option("--lora-alpha")] = 16.0,
    save_weights: Annotated[
        str | None, typer.Option("--save-weights", help="Hugging Face folder to write at the end.")
    ] = None,
    log_every: Annotated[int, typer.Option("--log-every")] = 1,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="File of JSON lines, one a step.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Folder for traces of steps 3 to 5.")
    ] = None,
    profile_ranks: Annotated[
        str, typer.Option("--profile-ranks", help="Ranks to trace, as in 0,3.")
    ] = "0",
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a silent rank counts as dead.")
    ] = 600.0,
    json: AsJson = False,
) -> None:
    """Train: in one process, or as a rank of torchrun (torchrun ... -m meshwright train ...)."""
    from meshwright.cli.text import print_json
    from meshwright.cost.flops import model_flops_per_step
    from meshwright.describe.job import Job
    from meshwright.describe.models import load_config, load_model
    from meshwright.errors import JobError
    from meshwright.parallel.layout import from_text

    _require_torch()
    from meshwright.runtime.optimizer import OptimizerSettings
    from meshwright.runtime.shape import shape_of
    from meshwright.runtime.train import train as run
    from meshwright.runtime.train_settings import TrainSettings

    described, config = load_model(model), dict(load_config(model))
    if not all(part.isdigit() for part in profile_ranks.split(",")):
        raise JobError("train.profile_ranks", profile_ranks, "It lists ranks.", "Write 0,3.")
    report = run(
        TrainSettings(
            shape=replace(shape_of(described, config), lora_rank=lora_rank, lora_alpha=lora_alpha),
            layout=from_text(layout, gpus=_world_size()),
            seq_len=seq_len,
            gbs=gbs,
            steps=steps,
            dtype=precision,
            seed=seed,
            data=data,
            optimizer=OptimizerSettings(lr=lr, weight_decay=weight_decay, clip_norm=clip_norm),
            decay=decay,
            warmup_steps=warmup_steps,
            min_lr=min_lr,
            checkpoints=checkpoints,
            save_every=save_every,
            keep=keep,
            weights=weights,
            save_weights=save_weights,
            config=config,
            log_every=log_every,
            metrics=metrics,
            profile=profile,
            profile_ranks=tuple(map(int, profile_ranks.split(","))),
            model_flops_per_step=model_flops_per_step(described, Job(seq_len=seq_len, gbs=gbs)),
            timeout_s=timeout,
        )
    )
    if json and report.rank == 0:
        print_json(report.to_dict())


def _world_size() -> int | None:
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdigit() else None


def _require_torch() -> None:
    from meshwright.errors import MeshwrightError

    if find_spec("torch") is None:
        rule = "Training needs PyTorch."
        raise MeshwrightError("torch", None, rule, "pip install 'meshwright[runtime]'")

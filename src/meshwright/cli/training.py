"""The command that trains: train."""

from __future__ import annotations

import os
import re
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
        list[str] | None,
        typer.Option(
            "--data",
            help="mock, the path prefix of a .bin/.idx corpus, a file (or 'pattern*') of json, "
            "parquet, arrow, csv or txt, a saved dataset, or hf:NAME:CONFIG:SPLIT. Several are "
            "mixed, by weights as in --data 0.3:web --data 0.7:books.",
            show_default="mock",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="tokenizer.json, its folder, or a hub name.")
    ] = None,
    column: Annotated[
        str, typer.Option("--column", help="Column of a dataset that holds the text.")
    ] = "text",
    data_cache: Annotated[
        str | None,
        typer.Option(
            "--data-cache",
            help="Folder for tokenized datasets.",
            show_default="~/.cache/meshwright/data",
        ),
    ] = None,
    valid_data: Annotated[
        list[str] | None, typer.Option("--valid-data", help="Data to validate on, as for --data.")
    ] = None,
    valid_fraction: Annotated[
        float,
        typer.Option("--valid-fraction", help="Part of the documents of --data held back instead."),
    ] = 0.0,
    valid_every: Annotated[
        int, typer.Option("--valid-every", help="Steps between validations; 0: none.")
    ] = 0,
    valid_batches: Annotated[
        int, typer.Option("--valid-batches", help="Global batches of a validation.")
    ] = 4,
    precision: Annotated[
        str, typer.Option("--precision", help="fp32, bf16 (float32 master weights) or fp64.")
    ] = "fp32",
    lr: Annotated[float, typer.Option("--lr", help="Highest learning rate.")] = 3e-4,
    min_lr: Annotated[float, typer.Option("--min-lr", help="Learning rate at the end.")] = 0.0,
    decay: Annotated[
        str,
        typer.Option("--decay", help="constant, linear, cosine or wsd (warm-up, stable, decay)."),
    ] = "cosine",
    warmup_steps: Annotated[
        int, typer.Option("--warmup-steps", help="Steps in which the rate rises from 0.")
    ] = 0,
    weight_decay: Annotated[
        float, typer.Option("--weight-decay", help="AdamW's, on matrices alone.")
    ] = 0.1,
    clip_norm: Annotated[
        float, typer.Option("--clip-norm", help="Largest gradient norm; 0: no clipping.")
    ] = 1.0,
    seed: Annotated[
        int, typer.Option("--seed", help="Of weights and data, the same under every layout.")
    ] = 1234,
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
    lora_alpha: Annotated[
        float, typer.Option("--lora-alpha", help="Low-rank changes are scaled by alpha / rank.")
    ] = 16.0,
    save_weights: Annotated[
        str | None, typer.Option("--save-weights", help="Hugging Face folder to write at the end.")
    ] = None,
    log_every: Annotated[int, typer.Option("--log-every", help="Steps between log lines.")] = 1,
    metrics: Annotated[
        str | None, typer.Option("--metrics", help="File of JSON lines, one a step.")
    ] = None,
    tensorboard: Annotated[
        str | None, typer.Option("--tensorboard", help="Folder of metrics for TensorBoard.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Folder for Chrome traces of some steps.")
    ] = None,
    profile_ranks: Annotated[
        str, typer.Option("--profile-ranks", help="Ranks to trace, as in 0,3.")
    ] = "0",
    profile_steps: Annotated[
        str | None,
        typer.Option("--profile-steps", help="First and last step to trace.", show_default="3-5"),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Run layers through torch.compile (tp=1, cp=1).")
    ] = False,
    switches: Annotated[
        str, typer.Option("--switches", help='What runs beside compute: "overlap_tp_comm=false".')
    ] = "",
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds until a silent rank counts as dead.")
    ] = 600.0,
    json: AsJson = False,
) -> None:
    """Train a model, in one process or as a rank of torchrun.

    Several ranks: torchrun --nproc-per-node 4 -m meshwright train MODEL --layout "tp=2 pp=2".

    Log lines (a bar, where a person watches) go to standard error, the report of --json to
    standard output. SIGTERM and Ctrl-C save after the step under way; the same command with the
    same --checkpoints goes on, also under another layout.
    """
    from meshwright.cli.text import print_json
    from meshwright.cost.flops import model_flops_per_step
    from meshwright.describe.job import Job
    from meshwright.describe.models import load_config, load_model
    from meshwright.parallel.layout import from_text

    _require_torch()
    from meshwright.runtime.optimizer import OptimizerSettings
    from meshwright.runtime.read_shape import assumed_of, shape_of
    from meshwright.runtime.switches import execution_from_text
    from meshwright.runtime.train import train as run
    from meshwright.runtime.train_settings import DataSettings, ProfileSettings, TrainSettings

    described, config = load_model(model), dict(load_config(model))
    task = "lora" if lora_rank else "pretrain"
    report = run(
        TrainSettings(
            shape=replace(shape_of(described, config), lora_rank=lora_rank, lora_alpha=lora_alpha),
            layout=from_text(layout, gpus=_world_size()),
            seq_len=seq_len,
            gbs=gbs,
            steps=steps,
            dtype=precision,
            execution=execution_from_text(switches),
            compile="inductor" if compiled else "",
            seed=seed,
            data=DataSettings(
                sources=tuple(data or ("mock",)),
                valid=tuple(valid_data or ()),
                valid_fraction=valid_fraction,
                tokenizer=tokenizer,
                column=column,
                cache=data_cache,
            ),
            valid_every=valid_every,
            valid_batches=valid_batches,
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
            tensorboard=tensorboard,
            profile=None
            if profile is None
            else ProfileSettings(
                folder=profile,
                ranks=_ranks(profile_ranks),
                steps=_span(profile_steps, steps),
            ),
            model_flops_per_step=model_flops_per_step(
                described, Job(seq_len=seq_len, gbs=gbs, task=task)
            ),
            timeout_s=timeout,
            assumed=assumed_of(described, config),
        )
    )
    if json and report.rank == 0:
        print_json(report.to_dict())


def _ranks(text: str) -> tuple[int, ...]:
    from meshwright.errors import JobError

    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise JobError("train.profile_ranks", text, "It lists ranks.", "Write 0,3.")
    return tuple(map(int, text.split(",")))


def _span(text: str | None, steps: int) -> tuple[int, int]:
    from meshwright.errors import JobError

    if text is None:
        return min(3, steps), min(5, steps)
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if found is None:
        raise JobError("train.profile_steps", text, "It is a first and a last step.", "Write 3-5.")
    return int(found[1]), int(found[2])


def _world_size() -> int | None:
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdigit() else None


def _require_torch() -> None:
    from meshwright.errors import MeshwrightError

    if find_spec("torch") is None:
        rule = "Training needs PyTorch."
        raise MeshwrightError("torch", None, rule, "pip install 'meshwright[runtime]'")

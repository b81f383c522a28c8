"""Training runs: the loss falls, runs resume exactly, faults are told. Provenance: ours."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meshwright.errors import DocumentError, JobError, LaunchError, MeshwrightError
from meshwright.parallel.layout import from_text
from meshwright.runtime.checkpoint import complete_checkpoints
from meshwright.runtime.data import write_corpus
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.train import train, train_rank
from meshwright.runtime.train_settings import TrainReport, TrainSettings
from meshwright.verify.small import default_shape, shrink

pytestmark = pytest.mark.parity


def _settings(layout: str, **changes: object) -> TrainSettings:
    x = from_text(layout)
    # One model for every layout of a test: the smallest that the largest of them divides.
    shape = shrink(default_shape(from_text("tp=2 pp=2")), from_text("tp=2 pp=2")).shape
    made = TrainSettings(
        shape=shape,
        layout=x,
        seq_len=32,
        gbs=8,
        steps=8,
        optimizer=OptimizerSettings(lr=1e-2),
        warmup_steps=2,
    )
    return replace(made, **changes)


def _run(settings: TrainSettings, timeout_s: float = 60.0) -> TrainReport:
    world = settings.layout.world_size
    return run_ranks(world, train_rank, settings, timeout_s=timeout_s)[0]


def test_the_loss_falls_on_four_ranks(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    report = _run(_settings("tp=2 pp=2", steps=40, gbs=8, metrics=str(metrics)))
    assert report.step == 40
    assert report.losses[-1] < 0.85 * report.losses[0]
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, 41))
    assert [r["loss"] for r in records] == report.losses
    assert records[-1]["tokens_per_s_per_gpu"] > 0


@pytest.mark.parametrize("layout", ["tp=2", "dp=2 zero=optim", "pp=2 zero=optim_grads_params"])
def test_a_resumed_run_has_the_same_losses_to_the_last_bit(layout: str, tmp_path: Path) -> None:
    whole = _run(_settings(layout))
    folder = str(tmp_path / "checkpoints")
    half = _settings(layout, checkpoints=folder, save_every=4)
    # The first run is told of eight steps too: the learning rate depends on them.
    first = _run(replace(half, data="mock"))
    assert first.losses == whole.losses
    shutil.rmtree(complete_checkpoints(Path(folder))[-1])
    resumed = _run(half)
    assert resumed.losses == whole.losses[4:]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("tp=2 pp=2", "dp=4 zero=optim"),
        ("dp=2 zero=optim_grads_params", "tp=2 cp=2"),
        ("pp=2 vpp=2 schedule=zb_v", "tp=2"),
        ("tp=2 dp=2 zero=optim", "tp=1"),
    ],
)
def test_a_run_resumes_under_another_layout(before: str, after: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    shape = shrink(default_shape(from_text("pp=2 vpp=2")), from_text("tp=2 pp=2 vpp=2")).shape
    whole = _run(_settings(before, shape=shape, checkpoints=folder, save_every=4))
    shutil.rmtree(complete_checkpoints(Path(folder))[-1])
    resumed = _run(_settings(after, shape=shape, checkpoints=folder))
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=2e-6)


def test_experts_resume_under_another_layout(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    shape = shrink(default_shape(from_text("ep=2 etp=2")), from_text("ep=4 etp=2 tp=2")).shape
    whole = _run(_settings("ep=2 etp=2", shape=shape, checkpoints=folder, save_every=4))
    shutil.rmtree(complete_checkpoints(Path(folder))[-1])
    resumed = _run(_settings("tp=2 ep=4 dp=2", shape=shape, checkpoints=folder))
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=2e-6)


def test_bf16_trains_with_float32_master_weights() -> None:
    fp32 = _run(_settings("dp=2", steps=10))
    for layout in ("dp=2 zero=optim", "tp=2 pp=2", "dp=2 zero=optim_grads_params"):
        bf16 = _run(_settings(layout, steps=10, dtype="bf16"))
        assert bf16.losses == pytest.approx(fp32.losses, rel=0.03)


def test_low_rank_changes_train_resume_and_leave_the_rest_alone(tmp_path: Path) -> None:
    settings = _settings("tp=2", checkpoints=str(tmp_path), save_every=4)
    settings = replace(settings, shape=replace(settings.shape, lora_rank=4))
    whole = _run(settings)
    assert whole.losses[-1] < whole.losses[0]
    shutil.rmtree(complete_checkpoints(tmp_path)[-1])
    resumed = _run(replace(settings, layout=from_text("pp=2")))
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=2e-6)


def test_a_corpus_trains_and_resumes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 101, size=n).astype(np.int32) for n in (100, 7, 300, 64)]
    write_corpus(tmp_path / "corpus", documents)
    report = _run(_settings("dp=2", data=str(tmp_path / "corpus"), steps=4))
    assert report.losses == pytest.approx(
        _run(_settings("tp=2", data=str(tmp_path / "corpus"), steps=4)).losses, rel=1e-5
    )


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = _settings("tp=1", checkpoints=str(folder), save_every=4)
    train(settings)
    newest = complete_checkpoints(folder)[-1]
    newest.rename(newest.with_name(newest.name + ".part"))
    assert complete_checkpoints(folder)[-1].name == "step-00000004"
    assert train(settings).step == 8


def test_a_checkpoint_cut_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    settings = _settings("tp=2", checkpoints=str(folder))
    _run(settings)
    file = sorted(complete_checkpoints(folder)[-1].glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DocumentError, match=r"step-00000008.*damaged"):
        _run(replace(settings, steps=9))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    settings = _settings("tp=1", checkpoints=str(tmp_path), steps=1)
    train(settings)
    other = replace(settings, shape=replace(settings.shape, ffn_hidden_size=64))
    with pytest.raises(DocumentError, match="mlp"):
        train(replace(other, steps=2))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DocumentError, match="could not be written"):
        train(_settings("tp=1", checkpoints=str(tmp_path / "file"), steps=1))


def test_a_gradient_that_stays_not_finite_ends_the_run() -> None:
    settings = _settings("tp=2", steps=20, optimizer=OptimizerSettings(lr=1e30, clip_norm=0.0))
    with pytest.raises(JobError, match="not finite in 5 steps"):
        _run(settings)


def _train_differently(rank: int, settings: TrainSettings) -> None:
    train_rank(rank, replace(settings, seed=settings.seed + (rank == 1)))


def test_ranks_that_were_told_different_things_are_named() -> None:
    with pytest.raises(LaunchError, match=r"rank = '?1'?: Its settings differ"):
        run_ranks(2, _train_differently, _settings("tp=2"), timeout_s=30)


def test_a_world_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(LaunchError, match="The layout has 2 ranks"):
        train(_settings("tp=2"))


def _stop_in_the_middle(rank: int, settings: TrainSettings) -> TrainReport:
    if rank == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.7)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    return train_rank(rank, settings)


def test_sigterm_at_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    settings = _settings("tp=2", steps=100_000, checkpoints=str(tmp_path), log_every=10_000)
    reports = run_ranks(2, _stop_in_the_middle, settings, timeout_s=60)
    assert all(report.stopped for report in reports)
    assert 0 < reports[0].step == reports[1].step < 100_000
    assert complete_checkpoints(tmp_path)[-1].name == f"step-{reports[0].step:08d}"


def test_a_profile_is_written(tmp_path: Path) -> None:
    train(_settings("tp=1", steps=4, profile=str(tmp_path), profile_steps=(2, 3)))
    assert json.loads((tmp_path / "rank0.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "train.steps"),
        ({"dtype": "fp8"}, "train.dtype"),
        ({"save_every": 2}, "train.save_every"),
        ({"gbs": 3, "layout": "dp=2"}, "job.gbs"),
        ({"seq_len": 31, "layout": "cp=2"}, "job.seq_len"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(
    changes: dict[str, object], field: str
) -> None:
    with pytest.raises(MeshwrightError) as refused:
        train(_settings(**({"layout": "tp=1"} | changes)))
    assert refused.value.field == field
    assert refused.value.remedy

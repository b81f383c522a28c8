"""Training runs: the loss falls, runs resume exactly, faults are told. Provenance: ours."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meshwright.errors import DocumentError, JobError, LaunchError, MeshwrightError
from meshwright.parallel.layout import from_text
from meshwright.runtime.checkpoint import complete_checkpoints
from meshwright.runtime.data import CorpusWriter
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.train import train, train_rank
from meshwright.runtime.train_settings import (
    DataSettings,
    ProfileSettings,
    TrainReport,
    TrainSettings,
)
from meshwright.verify.small import default_shape, shrink
from meshwright.verify.structures import STRUCTURES

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
    first = _run(half)
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


def test_router_biases_go_on_moving_under_another_layout(tmp_path: Path) -> None:
    shape = replace(STRUCTURES["balanced"], mtp_layers=0, moe_layers=(1, 2, 3))
    assert shape.moe is not None
    shape = replace(shape, moe=replace(shape.moe, capacity_factor=0.0))
    folder, metrics = str(tmp_path / "checkpoints"), tmp_path / "metrics.jsonl"
    settings = _settings("ep=2 pp=2", shape=shape, checkpoints=folder, save_every=4)
    whole = _run(replace(settings, metrics=str(metrics)))
    counts = [json.loads(line)["expert_tokens"] for line in metrics.read_text().splitlines()]
    assert len(counts) == settings.steps
    tokens = settings.gbs * settings.seq_len * shape.moe.topk
    for step in counts:
        assert sorted(step) == [f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)]
        assert {sum(experts) for experts in step.values()} == {tokens}
    shutil.rmtree(complete_checkpoints(Path(folder))[-1])
    resumed = _run(_settings("tp=2 ep=4 dp=2 zero=optim", shape=shape, checkpoints=folder))
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


def test_a_blend_of_a_corpus_trains_and_resumes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 101, size=n).astype(np.int32) for n in (100, 7, 300, 64)]
    with CorpusWriter(tmp_path / "corpus") as writer:
        for document in documents:
            writer.append(document)
    data = DataSettings(sources=(f"0.7:{tmp_path / 'corpus'}", "0.3:mock"))
    whole = _run(_settings("dp=2", data=data, checkpoints=str(tmp_path), save_every=4))
    shutil.rmtree(complete_checkpoints(tmp_path)[-1])
    resumed = _run(_settings("tp=2", data=data, checkpoints=str(tmp_path)))
    assert resumed.losses == pytest.approx(whole.losses[4:], rel=1e-5)


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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"[]"),
        ("state.json", b'{"step": 1}'),
        ("state.json", b'{"step": 1, "samples": null, "optimizer_steps": 1}'),
        ("state.json", b'{"step": -1, "samples": 8, "optimizer_steps": 1}'),
        (".metadata", b"hello"),
        (".metadata", pickle.dumps(3)),
        ("__0_0.distcp", b""),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_told_in_a_line(
    file: str, content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = _settings("tp=1", checkpoints=str(tmp_path), steps=1)
    train(settings)
    (complete_checkpoints(tmp_path)[-1] / file).write_bytes(content)
    with pytest.raises(DocumentError, match=r"step-00000001.*It is damaged: \S") as told:
        train(replace(settings, steps=2))
    assert len(str(told.value)) < 400
    assert "Traceback" not in capfd.readouterr().err


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


@pytest.mark.parametrize("name", ["checkpoints", "save_weights"])
def test_a_folder_that_could_not_be_written_in_the_end_is_told_before_the_first_step(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    metrics = tmp_path / "metrics.jsonl"
    settings = _settings("dp=2", metrics=str(metrics), **{name: str(tmp_path / "file")})
    with pytest.raises(DocumentError, match=f"train.{name} = .*could not be written"):
        _run(settings)
    assert not metrics.exists()


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


def test_a_profile_of_some_ranks_is_written(tmp_path: Path) -> None:
    profile = ProfileSettings(folder=str(tmp_path), ranks=(0, 2), steps=(2, 3))
    _run(_settings("tp=2 pp=2", steps=4, profile=profile))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank0.json", "rank2.json"]
    for path in tmp_path.iterdir():
        names = {event.get("name") for event in json.loads(path.read_text())["traceEvents"]}
        assert {"ProfilerStep#2", "ProfilerStep#1"} <= names
        assert "ProfilerStep#3" not in names


def _validates(rank: int, settings: TrainSettings) -> tuple[TrainReport, list[float]]:
    report = train_rank(rank, settings)
    return report, train_rank(rank, replace(settings, valid_every=0)).losses


@pytest.mark.parametrize(
    "layout",
    ["tp=1", "tp=2 pp=2", "pp=2 vpp=2 schedule=zb_v", "cp=2 dp=2 zero=optim_grads_params mbs=2"],
)
def test_validation_says_the_same_under_every_layout_and_changes_nothing(layout: str) -> None:
    shape = shrink(default_shape(from_text("pp=2 vpp=2")), from_text("tp=2 pp=2 vpp=2")).shape
    settings = _settings(layout, shape=shape, steps=4, valid_every=2, valid_batches=2)
    report, alone = run_ranks(settings.layout.world_size, _validates, settings, timeout_s=60)[0]
    assert report.losses == alone
    assert list(report.valid_losses) == [2, 4]
    global first_valid
    first_valid = first_valid or report.valid_losses
    assert report.valid_losses == pytest.approx(first_valid, rel=2e-6)
    assert report.valid_losses[4] != report.valid_losses[2]


first_valid: dict[int, float] = {}


def test_a_validation_batch_has_the_loss_that_a_step_would_have() -> None:
    shape = shrink(default_shape(from_text("tp=1")), from_text("tp=1")).shape
    engine = Engine(shape, from_text("tp=1"), Settings(seq_len=8, gbs=2))
    rows = torch.arange(18).view(2, 9)
    assert engine.evaluate(rows) == engine.forward_backward(rows)[0]


def test_metrics_of_tensorboard_and_json_lines_tell_the_same(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = tmp_path / "metrics.jsonl"
    settings = _settings(
        "tp=1", steps=4, valid_every=2, metrics=str(lines), tensorboard=str(tmp_path / "board")
    )
    report = train(settings)
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["loss"] for r in steps] == report.losses
    assert [r["samples"] for r in steps] == [8, 16, 24, 32]
    assert {r["step"]: r["valid_loss"] for r in records if "valid_loss" in r} == report.valid_losses
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(report.losses, rel=1e-6)
    assert [e.step for e in board.Scalars("valid_loss")] == [2, 4]
    assert {"grad_norm", "lr", "step_time_s", "memory_bytes"} <= set(board.Tags()["scalars"])


def test_model_flops_and_mfu_follow_from_the_step_time(tmp_path: Path) -> None:
    lines = tmp_path / "metrics.jsonl"
    settings = _settings(
        "tp=1", steps=2, metrics=str(lines), model_flops_per_step=6e9, peak_flops_per_s=1e12
    )
    train(settings)
    for record in map(json.loads, lines.read_text().splitlines()):
        flops_per_s = 6e9 / record["step_time_s"]
        assert record["model_flops_per_s_per_gpu"] == pytest.approx(flops_per_s)
        assert record["mfu_fraction"] == pytest.approx(flops_per_s / 1e12)
        assert record["tokens_per_s_per_gpu"] == pytest.approx(8 * 32 / record["step_time_s"])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_watching_person_gets_a_bar_and_a_file_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings("tp=1", steps=3, valid_every=3)
    train(settings)
    lines = capsys.readouterr().err
    assert [f"step {n}/3 | loss" in lines for n in (1, 2, 3)] == [True] * 3
    assert "TP=1 PP=1" in lines
    terminal = _Terminal()
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", terminal)
    train(settings)
    shown = terminal.getvalue()
    assert "step 1/3" not in shown
    assert "3/3" in shown
    assert "valid 3/3 | loss" in shown


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / "step-00000099.part").mkdir()
    train(_settings("tp=1", checkpoints=str(tmp_path), save_every=1, keep=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007", "step-00000008"]


def _without_space(rank: int, settings: TrainSettings) -> TrainReport:
    if rank == 1:
        # The kernel refuses to write more, as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return train_rank(rank, settings)


def test_a_full_disk_at_one_rank_is_told_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    settings = _settings("dp=2", checkpoints=str(tmp_path), steps=2)
    _run(settings)
    more = replace(settings, steps=100, save_every=2)
    with pytest.raises(DocumentError, match=r"could not be written: rank 1: .*File too large"):
        run_ranks(2, _without_space, more, timeout_s=60)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]
    assert _run(replace(settings, steps=3)).first == 2


def _killed_before_the_rename(rank: int, settings: TrainSettings) -> TrainReport:
    def replace_nothing(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        os.replace = replace_nothing
    return train_rank(rank, settings)


def test_a_run_killed_while_it_saves_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    settings = _settings("tp=2", checkpoints=str(tmp_path), steps=2)
    _run(settings)
    with pytest.raises(LaunchError, match=r"rank = 0.*SIGKILL"):
        run_ranks(2, _killed_before_the_rename, replace(settings, steps=4), timeout_s=60)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["step-00000002", "step-00000004.part"]
    resumed = _run(replace(settings, steps=4))
    assert resumed.first == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_resumed_run_says_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings("tp=1", checkpoints=str(tmp_path), steps=1)
    train(settings)
    train(replace(settings, steps=2, seed=7))
    told = capsys.readouterr().err
    assert "note: seed was 1234 and is now 7" in told
    assert "note: gbs" not in told


def test_a_dataset_of_text_trains_alike_under_two_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    path = tmp_path / "tokens.jsonl"
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(0, 101, size=50).tolist()} for _ in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(sources=(str(path),), valid_fraction=0.2, cache=str(tmp_path / "cache"))
    settings = _settings("dp=2", steps=3, data=data, valid_every=3)
    one = _run(settings)
    two = _run(replace(settings, layout=from_text("tp=2")))
    assert one.losses == pytest.approx(two.losses, rel=1e-5)
    assert one.valid_losses == pytest.approx(two.valid_losses, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 0}, "train.steps"),
        ({"seed": -1}, "train.seed"),
        ({"min_lr": 0.1}, "train.min_lr"),
        ({"shape": replace(STRUCTURES["lora"], lora_alpha=math.nan)}, "train.lora_alpha"),
        ({"dtype": "fp8"}, "train.dtype"),
        ({"save_every": 2}, "train.save_every"),
        ({"valid_batches": 0}, "train.valid_batches"),
        ({"optimizer": OptimizerSettings(lr=float("nan"))}, "train.lr"),
        ({"data": DataSettings(sources=("0:mock",))}, "train.data"),
        ({"profile": ProfileSettings(folder="x", ranks=(1,))}, "train.profile_ranks"),
        ({"profile": ProfileSettings(folder="x", steps=(3, 9))}, "train.profile_steps"),
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

"""Communication beside compute changes no number, and is what the switches say. Provenance: law."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from meshwright.describe.job import Execution
from meshwright.parallel.layout import from_text
from meshwright.runtime import tensor_parallel
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.flat_buffer import FlatBuffer
from meshwright.runtime.launch import run_ranks
from meshwright.verify import numerics
from meshwright.verify.structures import STRUCTURES

NOTHING = Execution(
    overlap_grad_reduce=False,
    overlap_param_gather=False,
    overlap_tp_comm=False,
    overlap_cp_comm=False,
    overlap_pp_comm=False,
)
LAYOUTS = [
    ("default", "dp=2 zero=no_shard"),
    ("default", "dp=2 zero=optim"),
    ("deepseek_v3", "dp=2 ep=2 zero=optim_grads"),
    ("default", "dp=2 pp=2 vpp=2 schedule=zb_v zero=optim"),
    ("default", "dp=4 dp_replicate=2 zero=optim"),
    ("lora", "dp=2 pp=2 zero=optim_grads_params recompute=full:uniform:2"),
    ("deepseek_v3", "dp=2 tp=2 sp=false zero=optim_grads_params"),
    ("qwen3", "tp=2 pp=2 vpp=2"),
    ("default", "cp=2 tp=2"),
]


def _verify_with(monkeypatch: pytest.MonkeyPatch, model: str, text: str, **more: object) -> None:
    monkeypatch.setattr(numerics, "Settings", partial(Settings, **more))
    report = numerics.verify(text, STRUCTURES.get(model), dtype="float64", timeout_s=60.0)
    assert report.ok, (report.max_loss_diff, report.max_grad_diff, report.worst)


@pytest.mark.parity
@pytest.mark.parametrize(("model", "text"), LAYOUTS)
def test_small_buckets_reduced_during_backward_equal_one_process(
    monkeypatch: pytest.MonkeyPatch, model: str, text: str
) -> None:
    _verify_with(monkeypatch, model, text, bucket_bytes=4096)


@pytest.mark.parity
@pytest.mark.parametrize(("model", "text"), LAYOUTS[::2])
def test_nothing_overlapped_equals_one_process(
    monkeypatch: pytest.MonkeyPatch, model: str, text: str
) -> None:
    _verify_with(monkeypatch, model, text, execution=NOTHING)


@pytest.mark.parity
@pytest.mark.parametrize("text", ["tp=2 sp=false", "tp=4 sp=false recompute=full"])
def test_sums_that_travel_in_halves_equal_one_process(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(tensor_parallel, "UNDIVIDED_BYTES", 0)
    _verify_with(monkeypatch, "default", text)


@pytest.mark.parity
def test_a_bucket_that_nobody_collects_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatBuffer, "collect", lambda self: None)
    monkeypatch.setattr(numerics, "Settings", partial(Settings, bucket_bytes=4096))
    assert not numerics.verify("dp=2 zero=optim", dtype="float64", timeout_s=60.0).ok


def _order_of_a_step(rank: int, text: str, execution: Execution) -> list[str]:
    """Return what buffers do in one step, and where its backward passes end."""
    x = from_text(text)
    case = numerics.prepare(x)
    settings = Settings(seq_len=case.seq_len, gbs=case.gbs, execution=execution, bucket_bytes=4096)
    engine = Engine(case.shape, x, settings, rank=rank)
    seen: list[str] = []
    _note(seen, engine.dp, "finish")
    for buffer in engine.dp.buffers:
        _note(seen, buffer, "start_reduce")
        _note(seen, buffer, "prefetch")
    batch = torch.zeros((case.gbs, case.seq_len + 1), dtype=torch.int64)
    engine.step(engine.own_rows(batch))
    return seen


def _note(seen: list[str], owner: object, name: str) -> None:
    function = getattr(owner, name)

    def noted(*args: object) -> object:
        seen.append(name)
        return function(*args)

    setattr(owner, name, noted)


@pytest.mark.parity
@pytest.mark.parametrize("text", ["dp=2 zero=no_shard", "dp=2 zero=optim"])
def test_buckets_are_reduced_during_backward_only_where_switched_on(text: str) -> None:
    for execution, least in ((Execution(), 4), (NOTHING, 0)):
        first, second = run_ranks(2, _order_of_a_step, text, execution, timeout_s=60.0)
        assert first == second
        during = first[: first.index("finish")].count("start_reduce")
        assert during >= least if least else during == 0


@pytest.mark.parity
def test_sharded_weights_are_gathered_ahead_only_where_switched_on() -> None:
    text = "dp=2 zero=optim_grads_params"
    ahead, plain = (
        run_ranks(2, _order_of_a_step, text, execution, timeout_s=60.0)[0].count("prefetch")
        for execution in (Execution(), NOTHING)
    )
    assert ahead > plain

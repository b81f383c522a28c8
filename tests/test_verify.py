"""``verify`` tells right from wrong. Provenance: ours; law for the optimizer."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshwright.errors import LaunchError, LayoutError, MeshwrightError
from meshwright.parallel.layout import Pipeline, layout
from meshwright.runtime.data_parallel import DataParallel
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.flat_buffer import FlatBuffer
from meshwright.runtime.groups import Group
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.parameters import Box
from meshwright.runtime.tensor_parallel import vocab_parallel_cross_entropy
from meshwright.verify.numerics import NEGLIGIBLE, WHOLE_NORM, Part, compare, prepare, verify
from meshwright.verify.structures import STRUCTURES


@pytest.mark.parity
def test_the_report_has_the_fields_of_the_contract() -> None:
    report = verify("tp=2", timeout_s=60.0).to_dict()
    assert set(report) == {
        *("layout", "ranks", "ok", "dtype", "losses", "reference_losses", "max_loss_diff"),
        *("max_grad_diff", "max_param_diff", "worst", "seconds"),
    }
    assert report["ok"] is True
    assert report["ranks"] == 2
    assert len(report["losses"]) == len(report["reference_losses"]) == 3
    json.dumps(report)


@pytest.mark.parity
def test_a_gradient_that_was_not_summed_over_tp_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatBuffer, "sum_partials", lambda self, context: None)
    report = verify("tp=2", timeout_s=60.0)
    assert not report.ok
    assert "norm" in report.worst
    assert report.max_grad_diff > 1e-2


@pytest.mark.parity
def test_weights_that_were_not_published_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatBuffer, "publish", lambda self: None)
    report = verify("dp=2 zero=optim", timeout_s=60.0)
    assert not report.ok
    assert report.max_param_diff > 1e-6


@pytest.mark.parity
def test_a_norm_in_which_copies_count_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # AdamW's steps are the same when all gradients are scaled alike: parameters do not tell.
    true_norm = DataParallel.grad_norm

    def wrong(self: DataParallel) -> float:
        return true_norm(self) * (1.001 if self.context.layout.tp > 1 else 1.0)

    monkeypatch.setattr(DataParallel, "grad_norm", wrong)
    report = verify("tp=2", timeout_s=60.0)
    assert not report.ok
    assert report.worst == WHOLE_NORM
    assert report.max_grad_diff == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parity
@pytest.mark.parametrize("which", ["of a prediction depth", "of the routers"])
def test_a_wrong_loss_beside_the_main_one_is_found(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_loss = Engine.forward_backward

    def wrong(self: Engine, rows: Tensor, mask: Tensor | None = None) -> tuple[list[float], float]:
        (main, depth), routers = true_loss(self, rows, mask)
        factor = self.layout.tp
        if which == "of the routers":
            return [main, depth], routers * factor
        return [main, depth * factor], routers

    monkeypatch.setattr(Engine, "forward_backward", wrong)
    report = verify("tp=2", STRUCTURES["deepseek_v3"], timeout_s=60.0)
    assert not report.ok
    assert report.max_loss_diff == pytest.approx(1.0, rel=1e-3)
    assert report.losses == pytest.approx(report.reference_losses, rel=1e-5)


def _differences(values: list[float], reference: list[float]) -> dict[str, float]:
    """Compare parameters of one element each."""
    parts = [
        [
            Part(
                box=Box(name=str(number), shape=(1,), offsets=(0,)),
                local_shape=(1,),
                begin=0,
                values=np.array([value]),
            )
            for number, value in enumerate(given)
        ]
        for given in (values, reference)
    ]
    return compare(parts[1], [parts[0]], NEGLIGIBLE)


def test_what_is_not_a_number_is_different() -> None:
    assert _differences([math.nan, 1.0], [1.0, 1.0]) == {"0": math.inf, "1": 0.0}
    assert _differences([1.0], [math.nan]) == {"0": math.inf}


def test_a_gradient_where_there_should_be_none_is_different() -> None:
    assert _differences([0.5, 1.0], [0.0, 1.0]) == {"0": 0.5, "1": 0.0}
    assert _differences([1e-8, 1.0], [0.0, 1.0])["0"] <= 1e-8


@pytest.mark.parity
def test_a_rank_that_cannot_finish_in_time_is_an_error_of_launch() -> None:
    with pytest.raises(LaunchError, match="Not done after"):
        verify("tp=2", timeout_s=0.001)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("tp=2 ep=3 dp=2", "layout.ep"),
        ("tp=8 cp=16 cp_comm=a2a", "layout.world_size"),
        ("pp=2 vpp=3 schedule=zb_v", "layout.vpp"),
        ("pp=2 pipeline_layout=Ett", "layout.pipeline_layout"),
        ("cp=8 cp_comm=a2a+p2p hierarchical_cp=2x2x2", "layout.hierarchical_cp"),
        ("pp=2 first=300", "layout.first"),
    ],
)
def test_what_cannot_run_is_refused_before_a_process_starts(text: str, field: str) -> None:
    with pytest.raises(MeshwrightError) as refused:
        verify(text)
    assert refused.value.field == field
    assert refused.value.remedy


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(LayoutError, match="dtype"):
        verify("tp=1", dtype="float16")


@settings(max_examples=60, deadline=None)
@given(
    tp=st.sampled_from([1, 2, 3, 4]),
    cp=st.sampled_from([1, 2, 3]),
    pp=st.sampled_from([1, 2, 3]),
    vpp=st.sampled_from([1, 2]),
    ep=st.sampled_from([1, 2]),
    name=st.sampled_from(sorted(STRUCTURES)),
)
def test_the_small_model_fits_every_layout_or_is_refused_with_a_remedy(
    tp: int, cp: int, pp: int, vpp: int, ep: int, name: str
) -> None:
    try:
        case = prepare(layout(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep), STRUCTURES[name])
    except MeshwrightError as refused:
        assert refused.remedy
    else:
        assert case.shape.num_layers >= 2
        assert case.shape.num_heads % tp == 0
        assert case.gbs % pp == 0


def test_adamw_is_that_of_torch() -> None:
    shape = prepare(layout()).shape
    given_settings = Settings(
        seq_len=8, gbs=2, optimizer=OptimizerSettings(lr=1e-2, clip_norm=0.05)
    )
    engine = Engine(shape, layout(schedule=Pipeline.one_f_one_b), given_settings)
    ours = [p for b in engine.dp.buffers for p in b.members]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    decay = [p.box.decay for p in ours]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first optimizer imports the compiler
        adamw = torch.optim.AdamW(
            [
                {
                    "params": [p for p, d in zip(theirs, decay, strict=True) if d == wanted],
                    "weight_decay": 0.1 if wanted else 0.0,
                }
                for wanted in (True, False)
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        rows = torch.randint(0, shape.vocab_size, (2, 9), generator=generator)
        engine.forward_backward(rows)
        grads = {id(p.parameter): p.grad.clone() for p in engine.dp.pieces()}
        for our, their in zip(ours, theirs, strict=True):
            their.grad = grads[id(our)].view_as(their)
        torch.nn.utils.clip_grad_norm_(theirs, 0.05)
        adamw.step()
        engine.optimizer.step(1e-2)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.detach(), their.detach(), rtol=1e-5, atol=1e-7)


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    shape = prepare(layout()).shape
    engine = Engine(shape, layout(), Settings(seq_len=8, gbs=1))
    engine.forward_backward(torch.zeros((1, 9), dtype=torch.int64))
    next(engine.dp.pieces()).grad[0] = float("nan")
    before = [b.data.clone() for b in engine.dp.buffers]
    norm, updated = engine.optimizer.step(1e-3)
    assert not updated
    assert norm != norm
    for buffer, kept in zip(engine.dp.buffers, before, strict=True):
        assert torch.equal(buffer.data, kept)


def _vocabulary_loss(rank: int) -> tuple[float, list[list[float]]]:
    group = Group((0, 1), rank, torch.distributed.group.WORLD)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 2, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (5, 2), generator=generator)
    first, rows = rank * 6, 6 - rank
    own = torch.zeros(5, 2, 6, dtype=torch.float64)
    own[..., :rows] = logits[..., first : first + rows]
    own.requires_grad_()
    loss = vocab_parallel_cross_entropy(own, labels, first, rows, group).sum()
    loss.backward()
    assert own.grad is not None
    return float(loss.detach()), own.grad[..., :rows].flatten(0, 1).tolist()


@pytest.mark.parity
def test_cross_entropy_over_a_divided_vocabulary_is_that_of_torch() -> None:
    results = run_ranks(2, _vocabulary_loss, timeout_s=30)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 2, 11, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 11, (5, 2), generator=generator)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    assert logits.grad is not None
    grad = torch.cat([torch.tensor(r[1], dtype=torch.float64) for r in results], dim=-1)
    torch.testing.assert_close(grad, logits.grad.flatten(0, 1))
    assert results[0][0] == results[1][0] == pytest.approx(float(loss.detach()))

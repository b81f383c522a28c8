"""Compiled layers compute what layers compute. Provenance: ours."""

from __future__ import annotations

import pytest
import torch

from meshwright.errors import JobError, LayoutError
from meshwright.parallel.layout import from_text
from meshwright.runtime import compiled
from meshwright.runtime.compiled import check_compilable
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import run_ranks
from meshwright.verify.numerics import prepare
from meshwright.verify.structures import STRUCTURES


def _steps(rank: int, text: str, model: str, backend: str) -> list[float]:
    """Return losses and gradient norms of two steps."""
    x = from_text(text)
    case = prepare(x, STRUCTURES.get(model))
    settings = Settings(seq_len=case.seq_len, gbs=case.gbs, dtype=torch.float64, compile=backend)
    engine = Engine(case.shape, x, settings, rank=rank)
    generator = torch.Generator().manual_seed(0)
    found: list[float] = []
    for _ in range(2):
        size = (case.gbs, case.seq_len + 1)
        batch = torch.randint(0, case.shape.vocab_size, size, generator=generator)
        result = engine.step(engine.own_rows(batch))
        found += [result.loss, result.grad_norm]
    return found


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "text"),
    [("deepseek_v3", "recompute=core_attn"), ("default", "dp=2 zero=optim_grads_params")],
)
def test_compiled_layers_give_the_same_losses_and_gradients(model: str, text: str) -> None:
    world = from_text(text).world_size
    plain, traced = (
        run_ranks(world, _steps, text, model, backend, timeout_s=120.0)
        for backend in ("", "aot_eager")
    )
    assert traced[0] == pytest.approx(plain[0], rel=1e-10)


@pytest.mark.parametrize(("text", "field"), [("tp=2", "layout.tp"), ("cp=2", "layout.cp")])
def test_layers_that_communicate_inside_are_not_compiled(text: str, field: str) -> None:
    with pytest.raises(LayoutError) as caught:
        check_compilable(from_text(text), "inductor")
    assert caught.value.field == field


def test_a_missing_compiler_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled.torch.cuda, "is_available", lambda: False)
    with pytest.raises(JobError, match="compiler"):
        check_compilable(from_text("dp=2"), "inductor")

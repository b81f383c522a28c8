"""The small pieces of the runtime, without processes. Provenance: law, unless a test says more."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.describe.models import build_model, load_config, load_model
from meshwright.parallel.layout import Pipeline, from_text, layout
from meshwright.parallel.pipeline import build_schedule
from meshwright.runtime.attention import (
    Sight,
    attend,
    block_backward,
    block_forward,
    merge,
    visible,
)
from meshwright.runtime.boxes import rectangles
from meshwright.runtime.context_parallel import positions
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.expert_parallel import grouped_linear
from meshwright.runtime.groups import Group, cp_levels
from meshwright.runtime.optimizer import OptimizerSettings
from meshwright.runtime.parameters import Box, initial_values
from meshwright.runtime.pipeline_parallel import message_of
from meshwright.runtime.read_shape import assumed_of, shape_of
from meshwright.runtime.shape import Scores
from meshwright.runtime.tensor_parallel import WeightGradients, linear
from meshwright.runtime.train_loop import learning_rate
from meshwright.runtime.train_settings import TrainSettings
from meshwright.verify.numerics import prepare
from meshwright.verify.structures import STRUCTURES


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_flat_run_is_a_few_rectangles_that_cover_it_once(
    shape: list[int], data: st.DataObject
) -> None:
    total = math.prod(shape)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    whole = torch.arange(total).view(shape)
    seen: list[int] = []
    found = list(rectangles(tuple(shape), begin, end))
    for part, run in found:
        assert whole[part].flatten().tolist() == list(range(run.start, run.stop))
        seen += whole[part].flatten().tolist()
    assert seen == list(range(begin, end))
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (1, 4), (4, 1), (2, 2), (3, 2)])
def test_context_ranks_hold_every_position_once_and_the_zigzag_is_balanced(
    inner: int, outer: int
) -> None:
    seq_len = 2 * inner * outer * 3
    held = {
        (i, o): positions(seq_len, Group(tuple(range(inner)), i), Group(tuple(range(outer)), o))
        for i in range(inner)
        for o in range(outer)
    }
    assert sorted(torch.cat(list(held.values())).tolist()) == list(range(seq_len))
    # Work of an outer rank: how many tokens its tokens attend to, all together.
    work = {sum(int(held[i, o].sum()) for i in range(inner)) for o in range(outer)}
    assert len(work) == 1


def test_attention_over_blocks_of_keys_merges_to_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 8, 16, dtype=torch.float64, generator=generator) for n in (4, 2, 2)
    )
    whole = attend(q, k, v, 0.25)
    out, lse = block_forward(q[:, :, 4:], k[:, :, :4], v[:, :, :4], Sight(), Scores(0.25))
    own = block_forward(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], Sight(causal=True), Scores(0.25))
    merged, _ = merge(out, lse, *own)
    torch.testing.assert_close(merged, whole[:, :, 4:])


def test_a_window_hides_what_lies_further_back() -> None:
    q = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    near = attend(q, q, q, 0.5, window=2)
    torch.testing.assert_close(
        near[:, :, 5:], attend(q[:, :, 4:], q[:, :, 4:], q[:, :, 4:], 0.5)[:, :, 1:]
    )


@pytest.mark.parametrize("window", [3, 8, 20])
def test_masked_blocks_give_the_gradients_of_windowed_attention(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 12, d, dtype=torch.float64, generator=generator, requires_grad=True)
        for n, d in ((4, 16), (2, 16), (2, 8))
    )
    whole = attend(q, k, v, 0.25, window)
    grad = torch.randn(whole.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad(whole, (q, k, v), grad)
    with torch.no_grad():
        sight = Sight(seen=visible(12, 12, 0, window, q.device))
        out, lse = block_forward(q, k, v, sight, Scores(0.25))
        torch.testing.assert_close(out, whole)
        found = block_backward(grad, q, k, v, out, lse, sight, Scores(0.25))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_query_that_sees_nothing_of_a_block_takes_nothing_from_it() -> None:
    x = torch.ones(1, 1, 2, 4)
    seen = torch.tensor([[True, False], [False] * 2])
    out, lse = block_forward(x, x, x, Sight(seen=seen), Scores(1.0))
    assert out[0, 0].tolist() == [[1.0] * 4, [0.0] * 4]
    assert lse[0, 0].tolist() == [4.0, -math.inf]


def test_a_weight_gradient_that_waits_is_the_one_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, generator=generator, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(5, 4, generator=generator))
    F.linear(x, weight).square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    expected = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    later = WeightGradients()
    later.deferring = True
    linear(x, weight, None, later).square().sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    assert weight.grad is None
    with torch.no_grad():
        for work in later.take():
            work()
    torch.testing.assert_close(weight.grad, expected[1])
    assert not later.queue


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [[3, 0, 4], [0, 0, 0], [7, 0, 0]])
def test_grouped_products_are_one_product_per_expert(tokens: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(tokens), 8, generator=generator, dtype=dtype)
    weight = torch.randn(3, 12, 8, generator=generator, dtype=dtype)
    found = grouped_linear(x, weight, tokens, None)
    parts = [rows @ w.T for rows, w in zip(x.split(tokens), weight, strict=True)]
    torch.testing.assert_close(found, torch.cat(parts))


def test_initial_values_of_a_part_are_cut_from_the_whole() -> None:
    whole = initial_values(Box(name="w", shape=(6, 4), offsets=(0, 0)), (6, 4), seed=1)
    part = initial_values(Box(name="w", shape=(6, 4), offsets=(2, 1)), (3, 2), seed=1)
    assert torch.equal(part, whole[2:5, 1:3])
    padded = initial_values(Box(name="w", shape=(6, 4), offsets=(4, 0)), (4, 4), seed=1)
    assert torch.equal(padded[:2], whole[4:])
    assert not padded[2:].any()
    other = initial_values(Box(name="v", shape=(6, 4), offsets=(0, 0)), (6, 4), seed=1)
    assert not torch.equal(other, whole)


def test_initial_values_of_experts_do_not_depend_on_who_holds_them() -> None:
    whole = initial_values(
        Box(name="e", shape=(4, 6, 2), offsets=(0, 0, 0), expert=True), (4, 6, 2), seed=1
    )
    part = initial_values(
        Box(name="e", shape=(4, 6, 2), offsets=(2, 3, 0), expert=True), (2, 3, 2), seed=1
    )
    assert torch.equal(part, whole[2:, 3:])


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(list(Pipeline)), pp=st.integers(2, 4), microbatches=st.integers(1, 3))
def test_every_message_of_a_schedule_has_one_sender_and_one_use(
    kind: Pipeline, pp: int, microbatches: int
) -> None:
    vpp = 2 if kind in (Pipeline.interleaved, Pipeline.zb_v) else 1
    schedule = build_schedule(kind, pp, vpp, microbatches * pp)
    sent = [
        message
        for rank, actions in enumerate(schedule.ranks)
        for action in actions
        if (message := message_of(schedule, rank, action)) is not None
    ]
    assert len(sent) == len(set(sent)) == 2 * (pp * vpp - 1) * microbatches * pp
    for (kind_, stage, _), to in sent:
        assert schedule.rank_of_stage[stage] == to
        assert stage > 0 if kind_ == "F" else stage < pp * vpp - 1


def test_the_most_square_split_is_the_default_of_hierarchical_context_parallelism() -> None:
    assert cp_levels(from_text("cp=8 cp_comm=a2a+p2p")) == (2, 4)
    assert cp_levels(from_text("cp=8 cp_comm=a2a+p2p hierarchical_cp=4x2")) == (4, 2)
    assert cp_levels(from_text("cp=8 cp_comm=a2a")) == (8, 1)
    assert cp_levels(from_text("cp=8")) == (1, 8)


def _train_settings(**changes: object) -> TrainSettings:
    given: dict[str, object] = {
        "shape": STRUCTURES["lora"],
        "layout": layout(),
        "seq_len": 8,
        "gbs": 1,
        "steps": 100,
        "warmup_steps": 10,
        "min_lr": 0.1,
        "optimizer": OptimizerSettings(lr=1.0),
    }
    return TrainSettings(**(given | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd"])
def test_learning_rates_warm_up_and_fall_to_the_minimum(decay: str) -> None:
    made = _train_settings(decay=decay)
    rates = [learning_rate(made, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(1.0 if decay == "constant" else 0.1)
    if decay == "wsd":
        assert rates[90] == pytest.approx(1.0)


def test_recomputation_changes_no_gradient() -> None:
    shape = prepare(layout()).shape
    found: dict[str, list[torch.Tensor]] = {}
    for text in ("recompute=none", "recompute=full", "recompute=core_attn+layernorm+mlp"):
        engine = Engine(shape, from_text(text), Settings(seq_len=8, gbs=1))
        engine.forward_backward(torch.arange(9)[None])
        found[text] = [piece.grad.clone() for piece in engine.dp.pieces()]
    first, *others = found.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama3.1-8b", "Llama 3.1 8B", "meta-llama/Llama-3.1-8B"])
def test_a_known_model_has_its_published_numbers_however_it_is_spelled(name: str) -> None:
    model, config = load_model(name), load_config(name)
    shape = shape_of(model, config)
    assert (shape.rope.theta, shape.norm_eps, shape.rope.factor) == (500_000.0, 1e-5, 8.0)
    assert assumed_of(model, config) == ()


def test_what_a_config_leaves_open_is_listed() -> None:
    config = {"model_type": "qwen3_moe"}
    assert [line.split(" ")[0] for line in assumed_of(build_model(config), config)] == [
        "rms_norm_eps",
        "rope_theta",
        "router_aux_loss_coef",
        "norm_topk_prob",
    ]

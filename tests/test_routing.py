"""Capacity, balance and what keeps it, in one process. Provenance: law, unless a test says more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meshwright import api
from meshwright.describe.job import Execution
from meshwright.describe.models import build_model
from meshwright.errors import JobError, LayoutError, MeshwrightError, ModelError
from meshwright.parallel.layout import from_text
from meshwright.runtime.capacity import capacity, owners, token_groups, within_capacity
from meshwright.runtime.checkpoint import Checkpointer, load_checkpoint
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.read_shape import shape_of
from meshwright.runtime.shape import MoeShape
from meshwright.verify.structures import STRUCTURES

SEQ_LEN = 16
BATCH = torch.randint(0, 100, (4, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on cores that others use too are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _megatron(weights: Tensor, chosen: Tensor, moe: MoeShape) -> Tensor:
    """Megatron-LM's ``apply_router_token_dropping`` on the dense ``[t, E]`` tables.

    Of equal entries the first count, which Megatron leaves open.
    """
    probs = torch.zeros(len(chosen), moe.num_experts, dtype=torch.float64)
    probs.scatter_(1, chosen, weights)
    routing_map = torch.zeros_like(probs).scatter_(1, chosen, 1.0)
    by = probs if moe.drop_policy == "probs" else routing_map
    num_tokens = len(chosen) * moe.topk
    most = math.ceil((num_tokens / moe.num_experts) * moe.capacity_factor)
    taken = by.argsort(dim=0, descending=True, stable=True)[:most]
    mask = torch.zeros_like(probs).scatter_(0, taken, 1.0) * routing_map
    return mask.gather(1, chosen).bool()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 24),
    topk=st.integers(1, 3),
    policy=st.sampled_from(["probs", "position"]),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.3, 4.0]),
    seed=st.integers(0, 99),
)
def test_experts_take_what_megatrons_formulas_say(
    tokens: int, topk: int, policy: str, factor: float, seed: int
) -> None:
    moe = MoeShape(
        num_experts=4,
        topk=topk,
        ffn_hidden_size=8,
        capacity_factor=factor,
        drop_policy="probs" if policy == "probs" else "position",
    )
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, 4, generator=generator, dtype=torch.float64)
    weights, chosen = scores.topk(topk, dim=-1)
    one_group = torch.zeros(tokens, dtype=torch.int64)
    found = within_capacity(moe, chosen, weights, one_group, capacity(moe, tokens))
    assert torch.equal(found, _megatron(weights, chosen, moe))
    # Two groups side by side are each what they would be alone.
    both = within_capacity(
        moe,
        torch.cat([chosen, chosen.flip(0)]),
        torch.cat([weights, weights.flip(0)]),
        torch.cat([one_group, one_group + 1]),
        capacity(moe, tokens),
    )
    assert torch.equal(both[:tokens], found)
    assert torch.equal(both[tokens:], _megatron(weights.flip(0), chosen.flip(0), moe))


@pytest.mark.parametrize(
    "text", ["tp=1", "tp=2 cp=2", "cp=4 cp_comm=a2a+p2p", "tp=2 cp=2 cp_comm=a2a"]
)
def test_every_position_is_routed_by_one_rank_and_one_process_knows_which(text: str) -> None:
    x = from_text(text)
    found = owners(x, SEQ_LEN)
    ranks = x.tp * x.cp
    assert torch.bincount(found, minlength=ranks).tolist() == [SEQ_LEN // ranks] * ranks
    one = token_groups(from_text("tp=1"), x, SEQ_LEN, cp=0, tp=0)
    assert torch.equal(one, found)
    for rank in range(ranks):
        own = token_groups(x, x, SEQ_LEN, cp=rank // x.tp, tp=rank % x.tp)
        assert own.tolist() == [0] * (SEQ_LEN // ranks)


@pytest.mark.parametrize(("text", "of"), [("cp=2", "tp=1"), ("tp=2", "cp=2"), ("mbs=2", "mbs=1")])
def test_a_layout_that_cuts_groups_of_tokens_is_refused(text: str, of: str) -> None:
    with pytest.raises(LayoutError, match="compete for an expert's capacity"):
        token_groups(from_text(text), from_text(of), SEQ_LEN, cp=0, tp=0)


def _engine(name: str, **changed: object) -> Engine:
    shape = STRUCTURES[name]
    assert shape.moe is not None
    shape = replace(shape, moe=replace(shape.moe, **changed), mtp_layers=0)
    return Engine(shape, from_text("mbs=2"), Settings(seq_len=SEQ_LEN, gbs=4, noise=0.3))


def test_padding_to_capacity_changes_nothing_that_is_computed() -> None:
    plain = _engine("padded", pad_to_capacity=False).step(BATCH)
    padded = _engine("padded").step(BATCH)
    assert padded.loss == pytest.approx(plain.loss, rel=1e-6)
    assert padded.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6)


def test_a_capacity_that_holds_every_token_drops_none() -> None:
    plain = _engine("capacity", capacity_factor=0.0).step(BATCH)
    assert _engine("capacity", capacity_factor=4.0).step(BATCH) == plain
    assert _engine("capacity", capacity_factor=0.5).step(BATCH).loss != plain.loss


def test_every_token_of_the_batch_is_counted_once_whatever_is_recomputed() -> None:
    for recompute in ("none", "full", "moe"):
        shape = STRUCTURES["qwen2_moe"]
        x = from_text(f"mbs=2 recompute={recompute}")
        engine = Engine(shape, x, Settings(seq_len=SEQ_LEN, gbs=4))
        engine.step(BATCH)
        engine.evaluate(BATCH)
        counts = engine.expert_tokens()
        assert sorted(counts) == [f"model.layers.{i}.mlp.gate" for i in range(4)]
        assert [int(found.sum()) for found in counts.values()] == [4 * SEQ_LEN * 2] * 4


def test_the_bias_of_experts_with_too_few_tokens_rises_by_the_rate() -> None:
    engine = _engine("balanced", bias_update_rate=0.125)
    before = _biases(engine)
    engine.step(BATCH)
    counts = engine.expert_tokens()
    for name, bias in _biases(engine).items():
        load = counts[name.removesuffix(".e_score_correction_bias")]
        change = 0.125 * (load.mean() - load).sign()
        torch.testing.assert_close(bias - before[name], change.float(), rtol=1e-5, atol=1e-7)
        assert change.abs().max() > 0


def _biases(engine: Engine) -> dict[str, Tensor]:
    return {
        piece.parameter.box.name: piece.parameter.detach().clone()
        for piece in engine.dp.pieces(frozen=True)
        if "correction_bias" in piece.parameter.box.name
    }


def test_router_biases_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    engine = _engine("balanced")
    engine.step(BATCH)
    saver = Checkpointer(tmp_path, engine)
    path = saver.save(1, {"step": 1, "samples": 4, "optimizer_steps": 1})
    saver.wait()
    again = _engine("balanced")
    load_checkpoint(again, path)
    saved, found = _biases(engine), _biases(again)
    assert sorted(saved) == sorted(found)
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert again.step(BATCH).loss == engine.step(BATCH).loss


def test_biases_are_kept_in_32_bit_when_weights_are_in_16() -> None:
    shape = STRUCTURES["balanced"]
    settings_16 = Settings(seq_len=SEQ_LEN, gbs=4, dtype=torch.bfloat16)
    engine = Engine(replace(shape, mtp_layers=0), from_text("mbs=2"), settings_16)
    engine.step(BATCH)
    found = {round(abs(v), 6) for bias in _biases(engine).values() for v in bias.tolist()}
    assert found <= {0.0, 0.01}


def test_the_loss_of_sequences_is_the_mean_of_the_losses_of_each_alone() -> None:
    engine = _engine("qwen2_moe", balance="seq_aux_loss", aux_loss_coef=0.1, z_loss_coef=0.0)
    together = engine.step(BATCH).aux_loss
    one_by_one = Engine(engine.shape, from_text("mbs=1"), engine.settings).step(BATCH).aux_loss
    assert together == pytest.approx(one_by_one, rel=1e-5)
    joint = _engine("qwen2_moe", aux_loss_coef=0.1, z_loss_coef=0.0).step(BATCH).aux_loss
    assert abs(joint - together) > 1e-4


def test_balance_is_read_in_the_words_of_configs() -> None:
    keys = {
        "moe_expert_capacity_factor": 1.25,
        "moe_token_drop_policy": "position",
        "moe_pad_expert_input_to_capacity": True,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 0.02,
        "moe_z_loss_coeff": 0.001,
    }
    config = MIXTURE | keys
    moe = shape_of(build_model(config), config).moe
    assert moe is not None
    assert (moe.capacity_factor, moe.drop_policy, moe.pad_to_capacity) == (1.25, "position", True)
    assert (moe.balance, moe.aux_loss_coef, moe.z_loss_coef) == ("seq_aux_loss", 0.02, 0.001)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_token_drop_policy", "random"),
        ("moe_router_bias_update_rate", 0.001),
        ("moe_pad_expert_input_to_capacity", True),
        ("moe_expert_capacity_factor", -1.0),
    ],
)
def test_balance_that_cannot_be_is_refused_by_its_key(key: str, value: object) -> None:
    config = MIXTURE | {key: value}
    with pytest.raises(ModelError, match=key) as raised:
        check_runnable(shape_of(build_model(config), config), from_text("tp=1"), seq_len=16, gbs=1)
    assert raised.value.field == f"config.{key}"


@pytest.mark.parametrize("name", ["overlap_ep_comm", "delay_weight_grad", "capacity_factor"])
def test_switches_that_the_runtime_would_ignore_are_refused_by_name(name: str) -> None:
    execution = replace(Execution(), **{name: 2.0 if name == "capacity_factor" else True})
    given_settings = Settings(seq_len=SEQ_LEN, gbs=4, execution=execution)
    with pytest.raises(JobError) as raised:
        Engine(STRUCTURES["qwen2_moe"], from_text("tp=1"), given_settings)
    assert raised.value.field == f"job.{name}"


def test_updates_of_frozen_routers_are_refused() -> None:
    shape = replace(STRUCTURES["balanced"], lora_rank=4)
    with pytest.raises(MeshwrightError, match="frozen"):
        check_runnable(shape, from_text("tp=1"), seq_len=16, gbs=1)


def test_verify_takes_the_capacity_that_a_config_asks_for(tmp_path: Path) -> None:
    config = MIXTURE | {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = api.verify("tp=2 ep=2", model=str(tmp_path))
    assert report.ok
    assert report.shape.moe is not None
    assert report.shape.moe.capacity_factor == 1.0

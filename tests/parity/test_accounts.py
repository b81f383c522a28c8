"""What the runtime holds and sends is what the cost model says, to the byte. Provenance: ours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from meshwright.parallel.layout import from_text
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.parameters import parameters_of
from meshwright.runtime.shape import MlaShape, ModelShape, MoeShape
from meshwright.verify.account_report import account_report
from meshwright.verify.accounts import Entry, accounts
from meshwright.verify.described import described
from meshwright.verify.priced import activations_bytes, runtime_job
from meshwright.verify.structures import STRUCTURES

SEQ_LEN = 32
# Sizes at which neither vocabulary nor flat buffers are padded.
DENSE = ModelShape(
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    ffn_hidden_size=256,
    vocab_size=1024,
)
MODELS = {
    "dense": DENSE,
    "tied": replace(DENSE, tie_word_embeddings=True),
    "grouped queries": replace(DENSE, num_kv_heads=2),
    # Every token goes to every expert, so that routing is balanced.
    "moe": replace(
        DENSE,
        moe=MoeShape(num_experts=4, topk=4, ffn_hidden_size=256, shared_ffn_hidden_size=256),
        moe_layers=(1, 2, 3),
    ),
    "latent": replace(
        DENSE,
        mla=MlaShape(
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
    ),
    "mtp": replace(DENSE, mtp_layers=1),
}
CASES = [
    ("dense", "tp=2 sp=false dp=2"),
    ("grouped queries", "tp=2 pp=2 dp=2"),
    ("dense", "cp=2 cp_comm=all_gather dp=2 zero=optim_grads_params"),
    ("dense", "tp=2 cp=2 cp_comm=a2a"),
    ("dense", "pp=2 vpp=2 dp=2 zero=no_shard"),
    ("tied", "pp=2 vpp=2 schedule=zb_v dp=2 zero=optim_grads"),
    ("dense", "dp=4 dp_replicate=2 zero=optim_grads_params"),
    ("moe", "tp=2 ep=2 cp=2 pp=2"),
    ("moe", "tp=2 ep=2 etp=2 zero=optim_grads_params"),
    ("latent", "tp=2 cp=2"),
    ("mtp", "tp=2 pp=2"),
    ("mtp", "pp=4 pipeline_layout=Ettt|t|m|L"),
]


@pytest.mark.parity
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_every_rank_sends_and_holds_what_is_priced(model: str, layout: str) -> None:
    x = from_text(layout)
    gbs = x.dp * x.mbs * (4 if x.pp > 1 else 2)
    found = accounts(x, MODELS[model], seq_len=SEQ_LEN, gbs=gbs, timeout_s=60.0)
    assert {entry.rank for entry in found} == set(range(x.world_size))
    assert any("sent" in entry.what and entry.runtime_bytes > 0 for entry in found)
    wrong = [entry for entry in found if entry.unexplained_bytes]
    assert not wrong, [(e.rank, e.what, e.runtime_bytes, e.priced_bytes) for e in wrong[:4]]


@pytest.mark.parity
def test_a_message_too_many_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def one_sum_more(self: Engine, rows: Tensor) -> object:
        all_reduce(torch.ones(8), self.context.groups.dp)
        return step(self, rows)

    monkeypatch.setattr(Engine, "step", one_sum_more)
    found = accounts(from_text("dp=2"), DENSE, seq_len=SEQ_LEN, gbs=2, timeout_s=60.0)
    wrong = [entry for entry in found if entry.unexplained_bytes]
    assert [(e.rank, e.what, e.unexplained_bytes) for e in wrong] == [
        (rank, "sent along dp, edp", 32.0) for rank in range(2)
    ]


def test_what_is_known_to_differ_is_told_apart_from_what_is_not() -> None:
    entry = Entry(
        rank=0, what="sent along tp", runtime_bytes=9.0, priced_bytes=10.0, different_bytes=-2.0
    )
    assert entry.unexplained_bytes == 1.0


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_the_described_model_has_the_weights_that_the_runtime_makes(name: str) -> None:
    shape = replace(STRUCTURES[name], lora_rank=0)
    engine = Engine(shape, from_text("tp=1"), Settings(seq_len=SEQ_LEN, gbs=1))
    made = {m.box.name: m.numel() for chunk in engine.chunks for m in parameters_of(chunk)}
    model = described(shape)
    assert sum(made.values()) == model.num_params + model.num_mtp_params


@pytest.mark.parity
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("deepseek_v3", "tp=2 ep=2 pp=2 recompute=full"),
        ("qwen3", "tp=4 sp=false"),
        ("gpt_oss", "dp=2 zero=optim_grads"),
        ("mistral", "cp=4 cp_comm=a2a+p2p"),
    ],
)
def test_the_account_of_a_verified_layout_is_equal_in_even_sizes(model: str, layout: str) -> None:
    report = account_report(from_text(layout), STRUCTURES[model], timeout_s=60.0)
    wrong = [row for row in report.rows if abs(row.entry.unexplained_bytes) >= 0.5]
    assert report.equal, [(row.ranks, row.entry) for row in wrong] or report.why_not
    x = from_text(layout)
    held = [row for row in report.rows if row.entry.what == "weights_bytes"]
    assert sorted(rank for row in held for rank in row.ranks) == list(range(x.world_size))


def test_an_account_that_cannot_be_taken_says_why() -> None:
    report = account_report(from_text("dp=32"))
    assert report.equal is None
    assert "too large" in report.why_not


def test_what_is_kept_for_backward_is_what_is_priced_and_a_few_named_numbers() -> None:
    x = from_text("tp=1")
    engine = Engine(DENSE, x, Settings(seq_len=SEQ_LEN, gbs=1))
    parameters = {b.data.untyped_storage().data_ptr() for b in engine.dp.buffers}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.forward_backward(torch.zeros((1, SEQ_LEN + 1), dtype=torch.int64))
    runtime_bytes = sum(storage.nbytes() for storage in kept.values())
    rotary = sum(table.untyped_storage().nbytes() for table in engine.rope)
    scales_of_norms = 4 * SEQ_LEN * (2 * DENSE.num_layers + 1)
    # Token and label numbers (int64), which of them are here, the mask and the loss's weight.
    of_tokens = SEQ_LEN * (8 + 8 + 4 + 4) + 4
    said = activations_bytes(described(DENSE), runtime_job(SEQ_LEN, 1, "fp32"), x)
    assert runtime_bytes == said + rotary + scales_of_norms + of_tokens

"""What the runtime does not compute is refused by name. Provenance: law."""

from __future__ import annotations

import pytest

from meshwright.describe.models import build_model, load_config, load_model
from meshwright.errors import MeshwrightError, ModelError
from meshwright.parallel.layout import from_text
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.read_shape import shape_of
from meshwright.verify.structures import STRUCTURES

PLAIN = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "attention_dropout", 0.1),
        ("phi3", "resid_pdrop", 0.1),
        ("seed_oss", "residual_dropout", 0.1),
        ("llama", "hidden_act", "relu2"),
        ("gemma3_text", "hidden_activation", "gelu"),
        ("gemma2", "use_bidirectional_attention", True),
        ("smollm3", "use_sliding_window", True),
        ("gpt_oss", "swiglu_limit", 5.0),
        ("mixtral", "router_jitter_noise", 0.1),
        ("olmo2", "clip_qkv", 8.0),
        ("phi3", "rope_scaling", {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
    ],
)
def test_what_would_be_left_out_is_refused_by_its_key(
    model_type: str, key: str, value: object
) -> None:
    config = PLAIN | {"model_type": model_type, key: value}
    given = {"attention_dropout": 0.0, "residual_dropout": 0.0} | config
    plain = {k: v for k, v in given.items() if k != key} | {"residual_dropout": 0.0}
    shape_of(build_model(plain), plain)
    with pytest.raises(ModelError) as refused:
        shape_of(build_model(given), given)
    named = "rope_parameters" if key == "rope_scaling" else key
    assert refused.value.field == f"config.{named}"
    assert refused.value.remedy


def test_the_dropout_that_a_known_model_was_trained_with_is_told() -> None:
    with pytest.raises(ModelError, match=r"Set residual_dropout to 0\.0"):
        shape_of(load_model("seed-oss-36b"), load_config("seed-oss-36b"))


@pytest.mark.parametrize("name", ["gpt2", "falcon-7b", "deepseek-v3.2", "qwen3-next-80b-a3b"])
def test_a_family_that_is_not_computed_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ModelError, match="llama, ") as refused:
        shape_of(load_model(name), load_config(name))
    assert refused.value.field == "model.model_type"


@pytest.mark.parametrize(
    ("model", "text", "seq_len", "gbs", "field"),
    [
        ("qwen3", "tp=3", 32, 8, "layout.tp"),
        ("qwen3", "tp=16", 32, 8, "layout.tp"),
        ("olmo2", "tp=16", 32, 8, "layout.tp"),
        ("qwen3", "ep=2", 32, 8, "layout.ep"),
        ("qwen3", "etp=2", 32, 8, "layout.etp"),
        ("qwen2_moe", "ep=3", 48, 9, "layout.ep"),
        ("qwen2_moe", "etp=3", 48, 9, "layout.etp"),
        ("qwen2_moe", "dp=4 ep=4 dp_replicate=4 zero=optim", 32, 8, "layout.dp_replicate"),
        ("qwen2_moe", "tp=2 ep=2 etp=1 pp=2 order=tp-pp-cp-ep-dp", 32, 8, "layout.order"),
        ("qwen3", "cp=16 cp_comm=a2a", 32, 8, "layout.cp"),
        ("qwen3", "cp=8 cp_comm=a2a+p2p hierarchical_cp=2x2x2", 32, 8, "layout.hierarchical_cp"),
        ("qwen3", "cp=2", 30, 8, "job.seq_len"),
        ("qwen3", "tp=2", 31, 8, "job.seq_len"),
        ("qwen3", "dp=3", 32, 8, "job.gbs"),
        ("qwen3", "pp=3", 32, 9, "layout.pp"),
        ("qwen3", "pp=4 schedule=zb_v vpp=4", 32, 8, "layout.vpp"),
        ("deepseek_v3", "pp=2 pipeline_layout=Ettm|ttL", 32, 8, "layout.pipeline_layout"),
    ],
)
def test_layouts_that_a_model_or_batch_cannot_have_are_refused_before_any_rank_starts(
    model: str, text: str, seq_len: int, gbs: int, field: str
) -> None:
    with pytest.raises(MeshwrightError) as refused:
        check_runnable(STRUCTURES[model], from_text(text), seq_len=seq_len, gbs=gbs)
    assert refused.value.field == field
    assert refused.value.remedy

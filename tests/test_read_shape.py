"""What the runtime reads of a config: old and new spellings, nulls, defaults. Provenance: law.

That the numbers mean what they should is shown by logits (parity/test_hugging_face.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from meshwright.describe.models import build_model, load_config, load_model
from meshwright.errors import ModelError
from meshwright.runtime.families import FAMILIES
from meshwright.runtime.read_shape import assumed_of, shape_of
from meshwright.runtime.shape import ModelShape, Rope

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


def _read(model_type: str, **keys: object) -> ModelShape:
    config: Mapping[str, Any] = SIZES | {"model_type": model_type} | keys
    return shape_of(build_model(config), config)


def test_gemma_3_turns_windows_slowly_in_both_spellings_of_its_config() -> None:
    old = _read(
        "gemma3_text",
        rope_theta=1e6,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window=8,
        sliding_window_pattern=2,
    )
    new = _read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    assert old == new
    assert (old.rope.kind, old.rope.factor, old.rope.theta) == ("linear", 8.0, 1e6)
    assert old.window_rope is not None
    assert (old.window_rope.kind, old.window_rope.theta) == ("default", 5e3)
    assert old.window_layers == (0, 2)
    plain = _read("gemma3_text").window_rope
    assert plain is not None
    assert plain.theta == 1e4


def test_a_null_takes_a_cap_away_and_a_missing_key_does_not() -> None:
    usual, without = _read("gemma2"), _read("gemma2", attn_logit_softcapping=None)
    assert (usual.attention_softcap, usual.logit_softcap) == (50.0, 30.0)
    assert (without.attention_softcap, without.logit_softcap) == (0.0, 30.0)
    assert _read("gemma3_text").attention_softcap == 0.0
    config = SIZES | {"model_type": "gemma2", "attn_logit_softcapping": None}
    told = assumed_of(build_model(config), config)
    assert not any("attn_logit" in line for line in told)
    assert "final_logit_softcapping = 30.0, as the config says nothing" in told
    assert "query_pre_attn_scalar = 256.0, as the config says nothing" in told


@pytest.mark.parametrize(
    ("model_type", "keys", "turning"),
    [
        ("glm4_moe", {}, 8),
        ("glm4", {"rope_parameters": {"partial_rotary_factor": 0.25}}, 4),
        ("phi3", {"partial_rotary_factor": 0.75}, 12),
        ("minimax_m2", {"rotary_dim": 8}, 8),
        ("llama", {}, 16),
    ],
)
def test_a_part_of_a_head_turns(model_type: str, keys: dict[str, object], turning: int) -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
    extra = {"moe_intermediate_size": 16, "num_nextn_predict_layers": 0}
    assert _read(model_type, **experts, **extra, **keys).rotary_dim == turning


def test_of_a_multimodal_config_the_text_part_is_read() -> None:
    text = SIZES | {"model_type": "gemma3_text", "rope_theta": 5e5, "query_pre_attn_scalar": 64}
    config: Mapping[str, Any] = {"model_type": "gemma3", "text_config": text, "rope_theta": 1.0}
    model = build_model(config)
    assert shape_of(model, config) == shape_of(build_model(text), text)
    assert not any("query_pre_attn" in line for line in assumed_of(model, config))


def test_layers_that_do_not_turn_are_found() -> None:
    assert _read("smollm3").unrotated_layers == (3,)
    assert _read("smollm3", no_rope_layers=[1, 0, 1, 0]).unrotated_layers == (1, 3)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert _read("exaone4", layer_types=kinds, sliding_window=8).unrotated_layers == (1, 3)
    assert _read("exaone4", layer_types=["full_attention"] * 4).unrotated_layers == ()


def test_gpt_oss_stretches_positions_unless_told_otherwise() -> None:
    keys = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rope = _read("gpt_oss", **keys).rope
    expected = Rope(
        theta=1.5e5, kind="yarn", factor=32.0, original_max_seq_len=4096, truncate=False
    )
    assert rope == expected
    plain = _read("gpt_oss", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **keys)
    assert plain.rope.kind == "default"


def test_grouped_routing_and_its_normalisation_follow_the_config() -> None:
    usual = shape_of(load_model("deepseek-v3"), load_config("deepseek-v3")).moe
    config = dict(load_config("deepseek-v3")) | {"norm_topk_prob": False, "n_group": 4}
    other = shape_of(build_model(config), config).moe
    assert usual is not None
    assert other is not None
    assert (usual.normalise, usual.num_groups) == (True, 8)
    assert (other.normalise, other.num_groups) == (False, 4)


def test_sequence_balance_of_deepseek_is_read() -> None:
    config = dict(load_config("deepseek-v2")) | {"aux_loss_alpha": 0.003, "seq_aux": True}
    moe = shape_of(build_model(config), config).moe
    assert moe is not None
    assert (moe.balance, moe.aux_loss_coef) == ("seq_aux_loss", 0.003)


def test_every_computed_family_is_described() -> None:
    for model_type in FAMILIES:
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2}
        model = build_model(SIZES | experts | {"model_type": model_type})
        assert model.model_type == model_type


def test_the_page_on_the_runtime_names_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "runtime.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"[a-z0-9_]+", page.partition("## Families")[2].partition("Logits of")[0])
    )
    assert set(FAMILIES) <= named


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "rms_norm_eps", "small"),
        ("llama", "rms_norm_eps", float("nan")),
        ("llama", "initializer_range", -1),
        ("llama", "hidden_act", ["silu"]),
        ("llama", "rope_theta", "1e6"),
        ("llama", "rope_theta", 0),
        ("llama", "rope_scaling", "yarn"),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": "4"}),
        ("llama", "rope_scaling", {"rope_type": "yarn"}),
        ("llama", "rope_parameters", 3),
        ("gemma3_text", "rope_parameters", {"full_attention": 3}),
        ("gemma3_text", "rope_parameters", {"sliding_attention": 3}),
        ("gemma2", "attn_logit_softcapping", [50.0]),
        ("gemma2", "query_pre_attn_scalar", 0),
        ("granite", "logits_scaling", 0),
        ("phi3", "partial_rotary_factor", 1.5),
        ("smollm3", "no_rope_layers", 4),
        ("deepseek_v3", "n_group", "8"),
        ("deepseek_v3", "routed_scaling_factor", True),
        ("mixtral", "router_aux_loss_coef", float("inf")),
        ("mixtral", "moe_expert_capacity_factor", {}),
        ("qwen3_moe", "norm_topk_prob", "false"),
    ],
)
def test_a_value_that_is_no_such_number_or_word_is_refused_by_its_key(
    model_type: str, key: str, value: object
) -> None:
    with pytest.raises(ModelError) as refused:
        _read(model_type, **{**_needed(model_type), key: value})
    named = {key, *(value if isinstance(value, dict) else ())}
    if "rope_type" in named:
        named.add("rope_parameters")
    assert refused.value.field.split(".")[-1] in named
    assert refused.value.remedy


def _needed(model_type: str) -> dict[str, object]:
    """Return the keys that mixtures of experts have to give."""
    routed = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if model_type == "deepseek_v3":
        latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 8}
        return {
            **routed,
            **latent,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
        }
    return (
        {**routed, "num_local_experts": 4, "num_experts": 4}
        if model_type in ("mixtral", "qwen3_moe")
        else {}
    )


def test_features_that_turn_come_in_pairs() -> None:
    with pytest.raises(ModelError, match="head_dim = 7: Rotary positions turn pairs"):
        _read("llama", head_dim=7)
    with pytest.raises(ModelError, match=r"partial_rotary_factor = 0\.2"):
        _read("phi3", rope_parameters={"partial_rotary_factor": 0.2, "rope_theta": 1e4})

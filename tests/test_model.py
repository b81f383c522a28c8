"""Models: published sizes (paper), what layers keep (law, paper), names, files and bad configs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright
from meshwright import MeshwrightError, registry
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mlp
from meshwright.describe.model import Block, Model, OpKind
from meshwright.describe.models import (
    FAMILIES,
    build_model,
    known_models,
    known_names,
    load_model,
    parameters,
)
from meshwright.errors import DocumentError, ModelError
from meshwright.parallel.layout import Recompute

PUBLISHED = {
    "bloom-176b": 176_247_271_424,
    "bloom-7b1": 7_069_016_064,
    "codellama-34b": 33_743_970_304,
    "command-r-35b": 34_980_831_232,
    "command-r-plus-104b": 103_810_674_688,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-r1": 671_026_419_200,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "falcon-40b": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-27b": 27_227_128_320,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma3-1b": 999_885_952,
    "glm-4-32b": 32_566_081_536,
    "glm-4-9b": 9_400_279_040,
    "gpt-neox-20b": 20_554_567_680,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,
    "kimi-k2": 1_026_408_232_448,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama2-7b": 6_738_415_616,
    "llama3-70b": 70_553_706_496,
    "llama3-8b": 8_030_261_248,
    "llama3.1-405b": 405_853_388_800,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-large-123b": 122_610_069_504,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x22b": 140_620_634_112,
    "mixtral-8x7b": 46_702_792_704,
    "mpt-7b": 6_649_286_656,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo2-7b": 7_298_617_344,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3-medium": 13_960_238_080,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "pythia-6.9b": 6_857_302_016,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-72b": 72_706_203_648,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-next-80b-a3b": 79_674_391_296,
    "seed-oss-36b": 36_151_104_512,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
    "starcoder2-3b": 3_030_371_328,
    "starcoder2-7b": 7_173_923_840,
    "tinyllama-1.1b": 1_100_048_384,
    "yi-34b": 34_388_917_248,
    "yi-6b": 6_061_035_520,
}
"""Weights in the published checkpoints, multi-token prediction and other towers left out."""

BYTES = {"act": 2, "matmul": 2, "copy": 0, "fp32": 4, "byte": 1}


def blocks(model: Model) -> Iterator[Block]:
    """Yield every kind of block once."""
    yield from (model.embedding, *model.layer_kinds, model.head, *model.mtp_layers)


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_known_model_has_its_published_parameters(name: str, count: int) -> None:
    assert load_model(name).num_params == count


@pytest.mark.parametrize(
    ("name", "active", "mtp"),
    [
        ("deepseek-v3", 37.55e9, 11.61e9),
        ("qwen3-30b-a3b", 3.35e9, 0),
        ("mixtral-8x7b", 12.88e9, 0),
        ("gpt-oss-120b", 5.71e9, 0),
        ("llama4-maverick", 17.18e9, 0),
        ("glm-4.5-air", 13.42e9, 2.375e9),
    ],
)
def test_a_token_meets_the_published_active_parameters(
    name: str, active: float, mtp: float
) -> None:
    model = load_model(name)
    assert model.num_active_params == pytest.approx(active, rel=2e-3)
    assert model.num_mtp_params == pytest.approx(mtp, rel=2e-3)


def test_known_models_are_listed_with_their_sizes() -> None:
    listed = {known.name: known.num_params for known in known_models()}
    assert set(listed) == set(known_names()) >= set(PUBLISHED)
    assert listed["llama3-8b"] == 8_030_261_248


@pytest.mark.parametrize("name", known_names())
def test_a_known_model_assumes_nothing_and_keeps_the_laws_of_blocks(name: str) -> None:
    model = load_model(name)
    assert model.assumed == ()
    assert model.name == name
    for block in blocks(model):
        names = [op.name for op in block.ops]
        assert len(set(names)) == len(names)
        for op in block.ops:
            assert op.rerun & Recompute.full
            assert op.kind is not OpKind.grouped_matmul or op.copies == model.num_experts
            for saved in op.saved:
                assert saved.elements > 0
                assert saved.dropped & Recompute.full
    for block in (*model.layer_kinds, model.head):
        kinds = [comm.kind for op in block.ops for comm in op.comm]
        assert ("enter_tp" in kinds) == ("exit_tp" in kinds or "exit_vocab" in kinds)
        assert kinds.count("dispatch") == kinds.count("combine") == block.is_moe


def gpt(hidden: int, heads: int) -> Model:
    mixer = Attention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        qkv_bias=True,
        out_bias=True,
        rope=False,
    )
    ffn = Mlp(ffn_hidden_size=4 * hidden, gated=False, bias=True)
    return build_decoder(
        Decoder(
            model_type="gpt2",
            hidden_size=hidden,
            vocab_size=1000,
            layers=(Layer(mixer=mixer, ffn=ffn),) * 2,
            norm_weights=2,
            hidden_dropout=0.1,
        )
    )


def kept_bytes(block: Block, *, tp: int, sp: bool) -> float:
    """Return bytes per token without the log-sum-exp, which unfused attention does not keep."""
    saved = [s for op in block.ops for s in op.saved if s.name != "softmax_lse"]
    divisors = {"tp": tp, "sp": tp if sp else 1}
    return sum(s.elements * BYTES[s.dtype] / divisors[s.where] for s in saved)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_gpt_layer_keeps_34_sbh_bytes_as_korthikanti_counts(tp: int) -> None:
    hidden = 1024
    layer = gpt(hidden, 16).layer_kinds[0]
    assert kept_bytes(layer, tp=tp, sp=False) == (10 + 24 / tp) * hidden
    assert kept_bytes(layer, tp=tp, sp=True) == 34 / tp * hidden


@pytest.mark.parametrize(
    ("name", "module", "dropped"),
    [
        ("llama3-8b", "mlp", {"fc1_input", "fc1_output", "fc2_input"}),
        ("llama3-8b", "layernorm", set[str]()),
        ("llama3-8b", "core_attn", {"softmax_lse"}),
        ("qwen3-30b-a3b", "layernorm", {"moe_input"}),
        ("qwen3-30b-a3b", "moe_act", {"experts_fc2_input"}),
        (
            "deepseek-v3",
            "mla_up_proj",
            {"q_up_input", "kv_up_input", "q_k_v"},
        ),
        ("deepseek-v3", "layernorm", {"qkv_input", "moe_input"}),
        (
            "deepseek-v3",
            "shared_experts",
            {"shared_fc1_input", "shared_fc1_output", "shared_fc2_input"},
        ),
    ],
)
def test_recomputing_a_module_drops_what_megatron_drops(
    name: str, module: str, dropped: set[str]
) -> None:
    layer = load_model(name).layer_kinds[-1]
    saved = [s for op in layer.ops for s in op.saved]
    assert {s.name for s in saved if s.dropped & Recompute[module]} == dropped


@pytest.mark.parametrize(
    "text",
    [
        "llama3-8b",
        "Llama3-8B",
        "LLAMA-3-8B",
        "llama 3 8b",
        "meta-llama/Llama-3-8B",
        "Meta/llama3_8b",
    ],
)
def test_names_are_compared_by_letters_and_digits(text: str) -> None:
    assert load_model(text).name == "llama3-8b"


@pytest.mark.parametrize(
    ("text", "near"),
    [("llama3-7b", "llama3-70b"), ("deepseek-v33", "deepseek-v3"), ("qwen3-30b", "qwen3-30b-a3b")],
)
def test_an_unknown_name_gets_the_nearest_ones(text: str, near: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(text)
    assert near in caught.value.remedy


@pytest.mark.parametrize("text", ["", "  ", "/no/such/config.json", "a\0b", "x" * 5000, "~no/x"])
def test_a_name_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(MeshwrightError):
        load_model(text)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def test_a_config_is_found_by_file_and_by_folder(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 2}
    write(tmp_path / "config.json", json.dumps(config).encode())
    for path in (tmp_path, tmp_path / "config.json"):
        model = load_model(str(path))
        assert model.num_layers == 2
        assert "hidden_size = 4096 (left out; the default of the model type)" in model.assumed


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[1, 2]", b"\xff\xfe", b'{"model_type": ', b"[" * 100_000, b"NaN"],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DocumentError) as caught:
        load_model(write(tmp_path / "config.json", content))
    assert caught.value.remedy


def test_a_folder_without_a_config_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="no config"):
        load_model(str(tmp_path))
    with pytest.raises(DocumentError, match="at most"):
        load_model(write(tmp_path / "model.safetensors", b" " * (16 * 2**20 + 1)))


LLAMA: dict[str, Any] = {"model_type": "llama"}
MIXTRAL: dict[str, Any] = {"model_type": "mixtral"}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({}, "config.model_type"),
        ({"model_type": 7}, "config.model_type"),
        ({"model_type": "lama"}, "config.model_type"),
        ({"model_type": "__init__"}, "config.model_type"),
        ({"text_config": 3}, "config.text_config"),
        (LLAMA | {"hidden_size": 0}, "config.hidden_size"),
        (LLAMA | {"hidden_size": -4096}, "config.hidden_size"),
        (LLAMA | {"hidden_size": "4096"}, "config.hidden_size"),
        (LLAMA | {"hidden_size": 4096.5}, "config.hidden_size"),
        (LLAMA | {"hidden_size": True}, "config.hidden_size"),
        (LLAMA | {"hidden_size": 10**30}, "config.hidden_size"),
        (LLAMA | {"hidden_size": [4096]}, "config.hidden_size"),
        (LLAMA | {"num_hidden_layers": 10**9}, "config.num_hidden_layers"),
        (LLAMA | {"num_attention_heads": 33}, "config.num_attention_heads"),
        (LLAMA | {"num_key_value_heads": 5}, "model.num_key_value_heads"),
        (LLAMA | {"tie_word_embeddings": "no"}, "config.tie_word_embeddings"),
        (MIXTRAL | {"num_experts_per_tok": 9}, "model.topk"),
        (MIXTRAL | {"num_local_experts": 0}, "config.num_local_experts"),
        ({"model_type": "deepseek_v2"}, "config.num_experts_per_tok"),
        ({"model_type": "gemma2", "layer_types": ["x"] * 26}, "config.layer_types"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "config.layer_types"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [99]}, "config.mlp_only_layers"),
        (
            {"model_type": "deepseek_v3", "num_nextn_predict_layers": 10**9},
            "config.num_nextn_predict_layers",
        ),
        ({"model_type": "gpt2", "resid_pdrop": 2}, "config.resid_pdrop"),
        (
            {"model_type": "nemotron_h", "hybrid_override_pattern": "MX"},
            "config.hybrid_override_pattern",
        ),
    ],
)
def test_a_config_that_cannot_be_names_the_key(config: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError) as caught:
        parameters(config)
    assert caught.value.field == field
    assert caught.value.remedy


def test_an_unknown_family_is_answered_with_near_ones() -> None:
    with pytest.raises(ModelError) as caught:
        build_model({"model_type": "qwen3_mo"})
    assert "qwen3_moe" in caught.value.remedy


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-2, 9), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
SHAPE_KEYS = sorted(
    {
        key
        for name in known_names()
        for key in json.loads(
            (Path(meshwright.__file__).parent / "describe" / "configs" / f"{name}.json").read_text()
        )
    }
    - {"model_type", "_source"}
)


@settings(max_examples=300, deadline=None)
@given(
    family=st.sampled_from(registry.names(FAMILIES)),
    values=st.dictionaries(st.sampled_from(SHAPE_KEYS), JUNK, max_size=4),
)
def test_any_config_gives_a_model_or_a_reason(family: str, values: dict[str, Any]) -> None:
    try:
        model = build_model({"num_experts_per_tok": 2, **values, "model_type": family})
    except MeshwrightError as error:
        assert error.rule
    else:
        assert model.num_params >= model.num_active_params > 0


def test_a_multimodal_config_gives_its_text_decoder() -> None:
    text = {"hidden_size": 2304, "num_hidden_layers": 3, "model_type": "gemma3_text"}
    model = build_model({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert model.model_type == "gemma3_text"
    assert any("towers" in note for note in model.assumed)
    unnamed = {key: value for key, value in text.items() if key != "model_type"}
    same = build_model({"model_type": "gemma3", "text_config": unnamed})
    assert same.num_params == model.num_params


def test_parameters_counts_experts_embedding_and_layers_ahead() -> None:
    config = {"model_type": "deepseek_v3"}
    assert meshwright.parameters(config) == {
        "total": 671_026_419_200,
        "active": 37_552_297_472,
        "embedding": 129_280 * 7168,
        "expert": 58 * 256 * 3 * 7168 * 2048,
        "mtp": 11_610_068_224,
    }


def test_a_null_rank_and_null_heads_mean_what_transformers_means() -> None:
    without = parameters({"model_type": "deepseek_v3", "q_lora_rank": None})
    assert without["total"] != parameters({"model_type": "deepseek_v3"})["total"]
    multi_head = parameters({"model_type": "mistral", "num_key_value_heads": None})
    assert multi_head == parameters({"model_type": "mistral", "num_key_value_heads": 32})

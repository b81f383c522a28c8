"""Logits of tiny random checkpoints equal those of transformers. Provenance: oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from meshwright.describe.models import build_model
from meshwright.errors import DocumentError
from meshwright.parallel.layout import from_text
from meshwright.runtime import weights
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.read_shape import shape_of
from meshwright.runtime.weights import SINGLE, load_weights, save_weights

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    # transformers scripts parts of itself, which torch 2.13 calls deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SEQ_LEN = 16
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
SMALL_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}, "tp=2 pp=2"),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "tp=4"),
    "llama with yarn": ("llama", {"rope_parameters": YARN_ROPE, "head_dim": 16}, "cp=2"),
    "mistral": ("mistral", {"sliding_window": 6}, "tp=2"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "tp=2 cp=2"),
    "qwen3": ("qwen3", {"head_dim": 16}, "pp=2"),
    "olmo2": ("olmo2", {}, "tp=2"),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "ep=2 pp=2"),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
        "tp=2 ep=2",
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
        "ep=2 etp=2",
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "tp=2 ep=2"),
    "deepseek_v2": (
        "deepseek_v2",
        LATENT
        | {
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 2.0,
        },
        "tp=2",
    ),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {"n_group": 4, "topk_group": 2},
        "tp=2 pp=2 ep=2",
    ),
    "deepseek_v3 without a query rank": (
        "deepseek_v3",
        LATENT
        | {
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
        "pp=2",
    ),
    "kimi_k2": ("deepseek_v3", LATENT | {"n_group": 1, "topk_group": 1}, "tp=2 ep=2"),
    "phi3": ("phi3", {"sliding_window": 6, "rope_parameters": HALF_ROPE}, "tp=4"),
    "gemma": ("gemma", {"head_dim": 8}, "tp=2 pp=2"),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 2.0,
        },
        "tp=2 cp=2",
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "cp=2 pp=2",
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
        "tp=2 cp=2 ep=2 etp=2",
    ),
    "glm4": ("glm4", {"head_dim": 8}, "tp=2"),
    "glm4_moe": (
        "glm4_moe",
        SMALL_EXPERTS | {"use_qk_norm": True, "attention_bias": True, "n_group": 2},
        "pp=2 ep=2",
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        LATENT | {"mlp_layer_types": ["dense", "sparse"], "n_group": 2},
        "ep=2 etp=2",
    ),
    "dots1": ("dots1", SMALL_EXPERTS | {"norm_topk_prob": True}, "cp=2 ep=2"),
    "minimax_m2": (
        "minimax_m2",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "rope_parameters": HALF_ROPE,
        },
        "tp=2 ep=2",
    ),
    "flex_olmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}, "pp=2 ep=2"),
    "olmo3": (
        "olmo3",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "cp=2",
    ),
    "exaone4": (
        "exaone4",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "tp=2",
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, "tp=2"),
    "seed_oss": (
        "seed_oss",
        {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
        "tp=2",
    ),
    "cwm": ("cwm", {"head_dim": 8, "sliding_window": 6, "bos_token_id": 1}, "cp=2"),
    "ernie4_5": ("ernie4_5", {"head_dim": 8, "use_bias": True}, "tp=2"),
    "ministral": ("ministral", {"head_dim": 8, "sliding_window": 6}, "cp=2"),
    "internlm3": (
        "internlm3",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
        "tp=2",
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
        "pp=2",
    ),
}


def _reference(model_type: str, keys: dict[str, Any], folder: Path) -> torch.Tensor:
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | keys))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or "bias" in name:
                weight.add_(0.2 * torch.randn_like(weight))
        model.save_pretrained(folder)
        return model(_tokens()).logits


def _tokens() -> torch.Tensor:
    return torch.randint(0, 101, (2, SEQ_LEN), generator=torch.Generator().manual_seed(3))


def _logits(rank: int, text: str, folder: str, saved: str) -> Any:
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    shape, x = shape_of(build_model(config), config), from_text(text)
    gbs = 2 * x.dp * x.pp
    check_runnable(shape, x, seq_len=SEQ_LEN, gbs=gbs)
    engine = Engine(shape, x, Settings(seq_len=SEQ_LEN, gbs=gbs), rank=rank)
    load_weights(engine, Path(folder))
    if saved:
        save_weights(engine, Path(saved), config)
    found = engine.logits(_tokens())
    return None if found is None else found.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_under_any_layout(family: str, tmp_path: Path) -> None:
    model_type, keys, layout = FAMILIES[family]
    expected = _reference(model_type, keys, tmp_path)
    single = torch.tensor(_logits(0, "tp=1", str(tmp_path), ""))
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)
    saved = tmp_path / "saved"
    world = from_text(layout).world_size
    for rank_logits in run_ranks(world, _logits, layout, str(tmp_path), str(saved), timeout_s=60):
        if rank_logits is not None:
            torch.testing.assert_close(torch.tensor(rank_logits), expected, rtol=1e-4, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(_tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def _rename(folder: Path, rename: dict[str, str]) -> None:
    held = load_file(folder / SINGLE)
    for old, new in rename.items():
        held = {name.replace(old, new, 1): tensor for name, tensor in held.items()}
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "rename",
    [{"model.": "language_model.model."}, {"model.": "model.language_model."}],
    ids=["as published", "as saved since"],
)
def test_the_text_decoder_of_a_multimodal_checkpoint_is_read(
    rename: dict[str, str], tmp_path: Path
) -> None:
    model_type, keys, _ = FAMILIES["gemma3_text"]
    expected = _reference(model_type, keys, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    outer = {"model_type": "gemma3", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer), encoding="utf-8")
    _rename(tmp_path, rename)
    saved = tmp_path / "saved"
    found = torch.tensor(_logits(0, "tp=1", str(tmp_path), str(saved)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.float32)
    assert again.config.model_type == "gemma3_text"


def test_quantised_weights_are_refused_and_not_read_without_their_scales(tmp_path: Path) -> None:
    _reference("llama", {}, tmp_path)
    held = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    held[name] = held[name].to(torch.float8_e4m3fn)
    held[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(held, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(DocumentError, match="quantised"):
        _logits(0, "tp=1", str(tmp_path), "")


def test_weights_of_whole_numbers_are_refused(tmp_path: Path) -> None:
    _reference("llama", {}, tmp_path)
    held = load_file(tmp_path / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    held[name] = held[name].to(torch.int8)
    save_file(held, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(DocumentError, match=f"{name}.*quantised"):
        _logits(0, "tp=1", str(tmp_path), "")


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ([], "not an index"),
        ({"weight_map": 3}, "not an index"),
        ({"weight_map": [1, 2]}, "not an index"),
        ({"weight_map": {"model.norm.weight": 3}}, "not an index"),
        ({"weight_map": {"model.embed_tokens.weight": "other.safetensors"}}, "says that other"),
    ],
)
def test_an_index_that_does_not_fit_is_told(index: object, told: str, tmp_path: Path) -> None:
    _reference("llama", {}, tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / weights.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DocumentError, match=told):
        _logits(0, "tp=1", str(tmp_path), "")


def test_a_checkpoint_cut_in_the_middle_is_named(tmp_path: Path) -> None:
    _reference("llama", {}, tmp_path)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DocumentError, match=SINGLE):
        _logits(0, "tp=1", str(tmp_path), "")


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    _reference("llama", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DocumentError, match=r"layers\.2\."):
        _logits(0, "tp=1", str(tmp_path), "")


def _adapted_logits(rank: int, folder: str, saved: str) -> Any:
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    shape = replace(shape_of(build_model(config), config), lora_rank=4)
    settings = Settings(seq_len=SEQ_LEN, gbs=4, noise=0.3)
    engine = Engine(shape, from_text("tp=2"), settings, rank=rank)
    load_weights(engine, Path(folder))
    save_weights(engine, Path(saved), config)
    found = engine.logits(_tokens())
    return None if found is None else found.tolist()


def test_saved_weights_hold_the_low_rank_changes(tmp_path: Path) -> None:
    expected = _reference("llama", {}, tmp_path)
    saved = tmp_path / "saved"
    adapted = torch.tensor(
        run_ranks(2, _adapted_logits, str(tmp_path), str(saved), timeout_s=60)[0]
    )
    assert (adapted - expected).abs().max() > 1e-2
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(_tokens()).logits, adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(10_000, 10**9), (10**9, 10_000)], ids=["fewer", "more"])
def test_weights_saved_over_others_in_files_of_other_sizes_are_those_that_are_read(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _reference("llama", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    shape, saved = shape_of(build_model(config), config), tmp_path / "saved"
    for seed, most_bytes in enumerate(sizes):
        monkeypatch.setattr(weights, "MOST_FILE_BYTES", most_bytes)
        engine = Engine(shape, from_text("tp=1"), Settings(seq_len=SEQ_LEN, gbs=1, seed=seed))
        save_weights(engine, saved, config)
    expected = engine.logits(_tokens())
    assert expected is not None
    load_weights(engine, saved)
    assert torch.equal(expected, engine.logits(_tokens()))
    again = transformers.AutoModelForCausalLM.from_pretrained(saved, torch_dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(_tokens()).logits, expected, rtol=1e-4, atol=1e-4)

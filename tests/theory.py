"""Rows of ``data/theory.jsonl.gz``: Megatron's own counts, and the models they are counted on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import (
    Attention,
    Decoder,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.model import Model
from meshwright.parallel.layout import Layouts, layout, table


def rows() -> list[dict[str, Any]]:
    """Return every row of the oracle."""
    with gzip.open(Path(__file__).parent / "data" / "theory.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def model_of(config: dict[str, Any]) -> Model:
    """Return the model that Megatron built for a row, with its layers without TE."""
    hidden, count = config["hidden_size"], config["num_layers"]
    dense = Mlp(ffn_hidden_size=dense_ffn(config), gated=config["swiglu"], bias=config["bias"])
    sparse = sparse_pattern(config["moe_layer_freq"], count) if config["num_experts"] else []
    mixer = mixer_of(config)
    layers = [Layer(mixer=mixer, ffn=dense)] * count
    for i, is_sparse in enumerate(sparse):
        if is_sparse:
            layers[i] = Layer(mixer=mixer, ffn=experts_of(config))
    return build_decoder(
        Decoder(
            model_type="megatron",
            hidden_size=hidden,
            vocab_size=config["vocab_size"],
            layers=tuple(layers),
            max_seq_len=config["seq_length"],
            norm_weights=1 if config["normalization"] == "RMSNorm" else 2,
            tie_word_embeddings=not config["untie"],
            mtp=((layers[-1],),) * (config["mtp"] or 0),
        )
    )


def dense_ffn(config: dict[str, Any]) -> int:
    """Return Megatron's default where the row leaves it out."""
    hidden = config["hidden_size"]
    default = int(4 * hidden * 2 / 3) // 64 * 64 if config["swiglu"] else 4 * hidden
    return config["ffn_hidden_size"] or default


def sparse_pattern(freq: int | list[int], count: int) -> list[bool]:
    if isinstance(freq, int):
        return [i % freq == 0 for i in range(count)]
    return [bool(one) for one in freq]


def mixer_of(config: dict[str, Any]) -> Mixer:
    heads, latent = config["num_attention_heads"], config["mla"]
    if latent:
        return LatentAttention(
            num_heads=heads,
            q_lora_rank=latent["q_lora_rank"] or 0,
            kv_lora_rank=latent["kv_lora_rank"],
            qk_nope_head_dim=latent["qk_head_dim"],
            qk_rope_head_dim=latent["qk_pos_emb_head_dim"],
            v_head_dim=latent["v_head_dim"],
            norms=False,
            split_down=True,
        )
    return Attention(
        num_heads=heads,
        num_kv_heads=config["num_query_groups"] or heads,
        head_dim=config["kv_channels"] or config["hidden_size"] // heads,
        qkv_bias=config["bias"],
        out_bias=config["bias"],
    )


def experts_of(config: dict[str, Any]) -> FeedForward:
    return Moe(
        num_experts=config["num_experts"],
        topk=config["topk"],
        ffn_hidden_size=config["moe_ffn"],
        gated=config["swiglu"],
        shared_ffn_hidden_size=config["shared"] or 0,
    )


def layouts_of(config: dict[str, Any]) -> Layouts:
    """Return the row's layout as a one-row table."""
    etp = config["tp"] if config["etp"] is None else config["etp"]
    return table(
        [
            layout(
                tp=config["tp"],
                pp=config["pp"],
                vpp=config["vpp"] or 1,
                cp=config["cp"],
                ep=config["ep"],
                etp=etp if config["num_experts"] else 1,
                gpus=config["world_size"],
                first=config["first"] or 0,
                last=config["last"] or 0,
            )
        ]
    )

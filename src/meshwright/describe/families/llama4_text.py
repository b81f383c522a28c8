"""Llama 4 (text decoder): chunked attention, layers without rotation, one expert a token."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Mlp, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, windows


def build(config: Config) -> Model:
    """Return the model of a ``llama4_text`` config."""
    config = config.with_defaults(
        hidden_size=5120,
        intermediate_size=8192,
        intermediate_size_mlp=16384,
        num_hidden_layers=48,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=202048,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attention_bias=False,
        use_qk_norm=True,
        num_local_experts=16,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        no_rope_layer_interval=4,
        attention_chunk_size=8192,
    )
    num_layers = config.layers()
    expert_ffn = config.size("intermediate_size")
    experts = Moe(
        num_experts=config.size("num_local_experts"),
        topk=config.size("num_experts_per_tok"),
        ffn_hidden_size=expert_ffn,
        shared_ffn_hidden_size=expert_ffn,
    )
    dense = Mlp(ffn_hidden_size=config.size("intermediate_size_mlp"))
    step, interval = (
        config.size("interleave_moe_layer_step"),
        config.size("no_rope_layer_interval"),
    )
    sparse = config.indices("moe_layers", num_layers) or range(step - 1, num_layers, step)
    rotated = [bool((i + 1) % interval) for i in range(num_layers)]
    bias, normed = config.flag("attention_bias"), config.flag("use_qk_norm")
    layers = tuple(
        Layer(
            mixer=attention(
                config,
                qkv_bias=bias,
                out_bias=bias,
                qk_norm="weightless" if normed and rotated[i] else "",
                rope=rotated[i],
                window=window,
            ),
            ffn=experts if i in sparse else dense,
        )
        for i, window in enumerate(windows(config, rotated, "attention_chunk_size"))
    )
    return decoder(config, layers)

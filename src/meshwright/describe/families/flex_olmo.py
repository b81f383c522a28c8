"""FlexOlmo (arXiv:2507.07024): OLMo 2 layers with experts, norms after each branch."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder


def build(config: Config) -> Model:
    """Return the model of a ``flex_olmo`` config."""
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=100352,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_bias=False,
        num_experts=7,
        num_experts_per_tok=5,
    )
    bias = config.flag("attention_bias")
    layer = Layer(
        mixer=attention(config, qkv_bias=bias, out_bias=bias, qk_norm="whole"),
        ffn=Moe(
            num_experts=config.size("num_experts", also="num_local_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("intermediate_size"),
        ),
        norms="post",
    )
    return decoder(config, (layer,) * config.layers())

"""Nemotron-H and Nemotron 3 (arXiv:2504.03624): one mixer, MLP or mixture of experts a layer."""

from __future__ import annotations

from meshwright.describe.config import Config
from meshwright.describe.facts import Layer, Mamba, Moe
from meshwright.describe.model import Model
from meshwright.describe.standard import attention, decoder, mlp
from meshwright.errors import ModelError

LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
WORDS = {
    "linear_attention": "mamba",
    "full_attention": "attention",
    **{w: w for w in LETTERS.values()},
}


def build(config: Config) -> Model:
    """Return the model of a ``nemotron_h`` config.

    The order of layers is ``hybrid_override_pattern`` (M * - E) or ``layers_block_type`` (words).
    """
    config = config.with_defaults(
        hidden_size=4096,
        intermediate_size=21504,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131072,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        use_conv_bias=True,
        use_bias=False,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=7688,
        moe_shared_expert_intermediate_size=7688,
        num_nextn_predict_layers=0,
        hidden_dropout=0.0,
    )
    order = _order(config, "layers_block_type", "hybrid_override_pattern")
    ahead = _order(config, "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    depths = config.depths()
    if not order:
        order = ["mamba", "moe", "attention", "mlp"]
        config.assumed.append("layers_block_type = mamba, moe, attention, mlp (left out)")
    if config.given("num_hidden_layers") and config.layers() != len(order):
        config.assumed.append(f"num_hidden_layers = {len(order)} (as many as the pattern has)")
    layers = {word: _layer(config, word) for word in {*order, *(ahead if depths else ())}}
    return decoder(
        config,
        tuple(layers[word] for word in order),
        hidden_dropout=config.fraction("hidden_dropout"),
        mtp=(tuple(layers[word] for word in ahead or ("attention", "moe")),) * depths
        if depths
        else (),
    )


def _order(config: Config, words_key: str, letters_key: str) -> list[str]:
    if config.given(letters_key):
        text = config.text(letters_key)
        for letter in text:
            if letter not in LETTERS:
                rule = f"Its letters are {' '.join(LETTERS)}."
                raise ModelError(f"config.{letters_key}", letter, rule, "Write M, *, - or E.")
        return [LETTERS[letter] for letter in text]
    words = config.items(words_key) or []
    found = config.choices(words_key, WORDS, len(words)) or []
    return [WORDS[word] for word in found]


def _layer(config: Config, word: str) -> Layer:
    if word == "mamba":
        return Layer(
            mixer=Mamba(
                num_heads=config.size("mamba_num_heads"),
                head_dim=config.size("mamba_head_dim"),
                state_size=config.size("ssm_state_size"),
                num_groups=config.size("n_groups"),
                conv_kernel=config.size("conv_kernel"),
                conv_bias=config.flag("use_conv_bias"),
                bias=config.flag("use_bias"),
            )
        )
    if word == "attention":
        bias = config.flag("attention_bias")
        return Layer(mixer=attention(config, qkv_bias=bias, out_bias=bias, rope=False))
    if word == "mlp":
        return Layer(ffn=mlp(config, gated=False, bias=config.flag("mlp_bias")))
    return Layer(
        ffn=Moe(
            num_experts=config.size("n_routed_experts"),
            topk=config.size("num_experts_per_tok"),
            ffn_hidden_size=config.size("moe_intermediate_size"),
            gated=False,
            shared_ffn_hidden_size=config.size("moe_shared_expert_intermediate_size", low=0),
            correction_bias=True,
            latent_size=config.optional_size("moe_latent_size"),
        )
    )

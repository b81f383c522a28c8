"""A model in Megatron Core's words: from them, into them, or found by the name a launch gives."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, cast

from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, LatentAttention, Layer, Mlp, Moe
from meshwright.describe.model import Model
from meshwright.describe.models import known_names, load_config, load_model
from meshwright.errors import MeshwrightError, ModelError
from meshwright.frameworks.words import Words, flag, number

USUAL_VOCABULARY: Final = 128_256
"""Llama 3's; assumed where a launch names a tokenizer but no size."""

_TRAILING: Final = re.compile(
    r"[-_](hf|instruct|base|chat|it|thinking|preview|fp8|bf16|[0-9]{4}|pretrain|sft|peft|lora"
    r"|finetune|config|recipe|64k|mock|perf)$"
)
_LEADING: Final = re.compile(r"^(meta|hf|nvidia|mistral-ai|deepseek-ai)[-_]")

_FLAVORS: Final = {"deepseekv316b": "deepseekv2lite"}
"""torchtitan's names for shapes that were published under another one."""


def find_model(text: str) -> Model | None:
    """Return the model that a launch names: a path, a known name, a Hugging Face id, a recipe.

    None when it is not one of the known models and no such file exists.
    """
    text = text.strip()
    name = _plain_name(text)
    name = _FLAVORS.get(name, name)
    if name in _by_plain_name():
        return load_model(_by_plain_name()[name])
    sized = _with_size(name)
    if sized is not None:
        return sized
    begun = [n for n in _by_plain_name() if n.startswith(name)] if len(name) > 6 else []
    if len(begun) == 1:
        return load_model(_by_plain_name()[begun[0]])
    if len(text) < 1024 and ("/" in text or text.endswith(".json")) and _exists(text):
        return load_model(text)
    return None


def _with_size(name: str) -> Model | None:
    """Return the known model that ``name`` adds its size to: ``deepseek_v3_671b``."""
    for digits in range(1, 5):
        base, size = name[: -1 - digits], name[-1 - digits : -1]
        if name.endswith("b") and size.isdecimal() and base in _by_plain_name():
            model = load_model(_by_plain_name()[base])
            if round(model.num_params / 1e9) == int(size):
                return model
    return None


def _exists(text: str) -> bool:
    try:
        path = Path(text)
        return path.is_file() or (path / "config.json").is_file()
    except (OSError, ValueError):
        return False


def _plain_name(text: str) -> str:
    """Return the letters and digits that tell models apart: ``Meta-Llama-3-70B`` -> llama370b."""
    name = text.rstrip("/").rpartition("/")[2].lower()[:100]
    for _ in range(4):
        name = _LEADING.sub("", _TRAILING.sub("", name))
    return re.sub(r"[^a-z0-9]", "", name)


@cache
def _by_plain_name() -> dict[str, str]:
    return {_plain_name(name): name for name in known_names()}


def model_of(words: Words) -> Model | None:
    """Return the model that the words describe; None when they neither name nor shape one.

    A named model keeps its shape where the words do not overwrite it.

    Raises ``ModelError`` (or ``LayoutError``) naming the word when the shape cannot be.
    """
    named = find_model(str(words["model"])) if words.get("model") else None
    if words.get("num_layers") is None or words.get("hidden_size") is None:
        return named
    if words.get("num_attention_heads") is None:
        return named
    if named is not None and _agrees(words, named):
        return named
    made = build_decoder(_decoder(words))
    twin = named or _twin(made)
    if twin is not None and not words.get("model"):
        return replace(made, name=twin.name)
    return made


_SHAPE: Final = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "num_query_groups": "num_kv_heads",
    "vocab_size": "vocab_size",
    "num_moe_experts": "num_experts",
}


def _agrees(words: Words, model: Model) -> bool:
    stated = ((word, words.get(word)) for word in _SHAPE)
    return all(v is None or v == getattr(model, _SHAPE[w]) for w, v in stated)


def _twin(model: Model) -> Model | None:
    """Return the known model of the same shape, if there is one."""
    shape = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "num_experts", "vocab_size")
    sizes = (model.hidden_size, model.num_layers, model.vocab_size)
    for name, stated in _sizes().items():
        if any(size not in (None, ours) for size, ours in zip(stated, sizes, strict=True)):
            continue
        other = load_model(name)
        if all(getattr(other, field) == getattr(model, field) for field in shape):
            return other
    return None


_SIZES: Final = (
    re.compile(r'"(?:hidden_size|n_embd|d_model)":\s*(\d{1,9})'),
    re.compile(r'"(?:num_hidden_layers|n_layers?)":\s*(\d{1,9})'),
    re.compile(r'"vocab_size":\s*(\d{1,9})'),
)


@cache
def _sizes() -> dict[str, tuple[int | None, ...]]:
    """Return hidden size, layers and vocabulary of the known models, as their configs state them.

    Building all of them to compare takes longer than the rest of a check.
    """
    found: dict[str, tuple[int | None, ...]] = {}
    folder = files("meshwright.describe") / "configs"
    for name in known_names():
        text = (folder / f"{name}.json").read_text(encoding="utf-8")
        matches = (pattern.search(text) for pattern in _SIZES)
        found[name] = tuple(int(m[1]) if m is not None else None for m in matches)
    return found


def _decoder(words: Words) -> Decoder:
    layer_ffn, assumed = _ffn(words), list[str]()
    mixer = _mixer(words)
    num_layers = number(words, "num_layers", 1)
    bias = flag(words, "add_bias_linear", True)
    gated = flag(words, "gated_linear_unit")
    dense = Layer(mixer=mixer, ffn=Mlp(ffn_hidden_size=layer_ffn, gated=gated, bias=bias))
    if num_layers > 65_536:
        rule = "A model has at most 65536 layers."
        raise ModelError("num_layers", num_layers, rule, "Use 65536 or less.")
    layers = (dense,) * num_layers
    if words.get("num_moe_experts"):
        moe = Layer(mixer=mixer, ffn=_moe(words, layer_ffn, gated, bias))
        layers = tuple(moe if m else dense for m in _moe_layers(words, num_layers))
    if isinstance(mixer, Attention) and mixer.window:
        whole = replace(mixer, window=0)
        windowed = _windowed_layers(words, num_layers)
        layers = tuple(
            x if w else replace(x, mixer=whole) for x, w in zip(layers, windowed, strict=True)
        )
    rms = words.get("normalization") == "RMSNorm"
    learned = words.get("position_embedding_type") == "learned_absolute"
    dropout = words.get("hidden_dropout")
    mtp = number(words, "mtp_num_layers", 0, low=0)
    return Decoder(
        model_type="gpt",
        name=str(words.get("model") or "gpt"),
        hidden_size=number(words, "hidden_size", 1),
        vocab_size=_vocabulary(words, assumed),
        layers=layers,
        max_seq_len=number(words, "max_position_embeddings", 0, low=0),
        norm_weights=1 if rms else 2,
        tie_word_embeddings=flag(words, "share_embeddings_and_output_weights"),
        learned_positions=number(words, "max_position_embeddings", 0, low=0) if learned else 0,
        hidden_dropout=float(dropout) if isinstance(dropout, int | float) else 0.0,
        mtp=((layers[-1],),) * min(mtp, 64),
        assumed=tuple(assumed),
    )


def _ffn(words: Words) -> int:
    hidden = number(words, "hidden_size", 1)
    default = 4 * hidden
    if flag(words, "gated_linear_unit"):
        default = max(int(4 * hidden * 2 / 3 / 64) * 64, 1)
    return number(words, "ffn_hidden_size", default)


def _mixer(words: Words) -> Attention | LatentAttention:
    heads = number(words, "num_attention_heads", 1)
    bias = flag(words, "add_bias_linear", True)
    if flag(words, "multi_latent_attention"):
        return LatentAttention(
            num_heads=heads,
            q_lora_rank=number(words, "q_lora_rank", 0, low=0),
            kv_lora_rank=number(words, "kv_lora_rank", 512),
            qk_nope_head_dim=number(words, "qk_head_dim", 128),
            qk_rope_head_dim=number(words, "qk_pos_emb_head_dim", 64),
            v_head_dim=number(words, "v_head_dim", 128),
            bias=bias,
        )
    hidden = number(words, "hidden_size", 1)
    window = words.get("window_size")
    first = cast("Sequence[Any]", window)[0] if isinstance(window, list | tuple) and window else 0
    return Attention(
        num_heads=heads,
        num_kv_heads=number(words, "num_query_groups", heads),
        head_dim=number(words, "kv_channels", max(hidden // heads, 1)),
        qkv_bias=flag(words, "add_qkv_bias") or bias,
        out_bias=bias,
        qk_norm="head" if flag(words, "qk_layernorm") else "",
        window=first if isinstance(first, int) and 0 < first < 2**31 else 0,
        sinks=words.get("softmax_type") == "learnable",
    )


def _windowed_layers(words: Words, num_layers: int) -> Iterable[bool]:
    """Return which layers have the window: all, all but every Nth, or as a pattern says."""
    freq = words.get("window_attn_skip_freq")
    if isinstance(freq, list | tuple):
        return _pattern_of("window_attn_skip_freq", cast("Sequence[Any]", freq), num_layers)
    every = number(words, "window_attn_skip_freq", 0, low=0)
    return [not every or (layer + 1) % every != 0 for layer in range(num_layers)]


def _pattern_of(word: str, freq: Sequence[Any], num_layers: int) -> list[bool]:
    if len(freq) != num_layers:
        rule = f"The pattern has one entry for each of the {num_layers} layers."
        raise ModelError(word, len(freq), rule, f"Write {num_layers} entries.")
    return [bool(v) for v in freq]


def _moe(words: Words, ffn: int, gated: bool, bias: bool) -> Moe:
    experts = number(words, "num_moe_experts", 1)
    return Moe(
        num_experts=experts,
        topk=number(words, "moe_router_topk", 2),
        ffn_hidden_size=number(words, "moe_ffn_hidden_size", ffn),
        gated=gated,
        shared_ffn_hidden_size=number(words, "moe_shared_expert_intermediate_size", 0, low=0),
        shared_gate=flag(words, "moe_shared_expert_gate"),
        correction_bias=flag(words, "moe_router_enable_expert_bias"),
        expert_bias=bias,
    )


def _moe_layers(words: Words, num_layers: int) -> Iterable[bool]:
    freq = words.get("moe_layer_freq")
    if isinstance(freq, list | tuple):
        return _pattern_of("moe_layer_freq", cast("Sequence[Any]", freq), num_layers)
    every = number(words, "moe_layer_freq", 1)
    return [layer % every == 0 for layer in range(num_layers)]


def _vocabulary(words: Words, assumed: list[str]) -> int:
    for word in ("vocab_size", "padded_vocab_size"):
        if words.get(word) is not None:
            return number(words, word, 1)
    assumed.append(f"vocab_size = {USUAL_VOCABULARY}: the launch names none; Llama 3's is taken")
    return USUAL_VOCABULARY


def model_words(model: Model) -> dict[str, Any]:
    """Return the words that describe a model.

    Raises ``ModelError`` when Megatron Core's GPT cannot express it: state-space layers, norms
    after a branch, layers that differ in more than experts.
    """
    facts = model.facts
    if facts is None:
        rule = "Its facts are not known, only its operations."
        raise ModelError("model", model.name, rule, "Give the model by config.json.")
    layer = _common_layer(facts, model.name)
    moe = next((f for f in facts.ffns() if isinstance(f, Moe)), None)
    mlp = next((f for f in facts.ffns() if isinstance(f, Mlp)), None)
    gated = moe.gated if moe is not None else mlp is not None and mlp.gated
    bias = (mlp.bias if mlp else False) or (moe.expert_bias if moe else False)
    words: dict[str, Any] = {
        "num_layers": len(facts.layers),
        "hidden_size": facts.hidden_size,
        "ffn_hidden_size": mlp.ffn_hidden_size if mlp else moe.ffn_hidden_size if moe else 1,
        "vocab_size": facts.vocab_size,
        "gated_linear_unit": gated,
        "add_bias_linear": bias,
        "normalization": "RMSNorm" if facts.norm_weights == 1 else "LayerNorm",
        "share_embeddings_and_output_weights": facts.tie_word_embeddings,
        "position_embedding_type": "learned_absolute" if facts.learned_positions else "rope",
        "hidden_dropout": facts.hidden_dropout,
        **_mixer_words(layer),
        **_window_words(facts),
        **_moe_words(facts, moe),
    }
    if facts.max_seq_len:
        words["max_position_embeddings"] = facts.max_seq_len
    if facts.mtp:
        words["mtp_num_layers"] = len(facts.mtp)
    return words


def _common_layer(facts: Decoder, name: str) -> Layer:
    """Return the layer whose mixer all layers share."""
    kinds = {(type(layer.mixer), layer.norms, layer.parallel) for layer in facts.layers}
    mixers = {layer.mixer for layer in facts.layers}
    plain = len(kinds) == 1 and next(iter(kinds))[1:] == ("pre", False)
    windows = {replace(m, window=0) if isinstance(m, Attention) else m for m in mixers}
    if not plain or len(windows) != 1:
        raise ModelError(
            "model",
            name,
            "Its layers are not those of one GPT: their mixers or norms differ.",
            "Use a framework that loads the model by name, such as skyrl or verl.",
        )
    layer = facts.layers[0]
    if not isinstance(layer.mixer, Attention | LatentAttention) or layer.ffn is None:
        raise ModelError(
            "model",
            name,
            "Its layers are not attention with a feed-forward network.",
            "Use a framework that loads the model by name, such as skyrl or verl.",
        )
    return layer


def _mixer_words(layer: Layer) -> dict[str, Any]:
    mixer = layer.mixer
    if isinstance(mixer, LatentAttention):
        words: dict[str, Any] = {
            "num_attention_heads": mixer.num_heads,
            "multi_latent_attention": True,
            "kv_lora_rank": mixer.kv_lora_rank,
            "qk_head_dim": mixer.qk_nope_head_dim,
            "qk_pos_emb_head_dim": mixer.qk_rope_head_dim,
            "v_head_dim": mixer.v_head_dim,
        }
        return words | ({"q_lora_rank": mixer.q_lora_rank} if mixer.q_lora_rank else {})
    assert isinstance(mixer, Attention), "_common_layer let no other mixer pass"
    words = {
        "num_attention_heads": mixer.num_heads,
        "num_query_groups": mixer.num_kv_heads,
        "kv_channels": mixer.head_dim,
    }
    if mixer.qkv_bias and not mixer.out_bias:
        words["add_qkv_bias"] = True
    if mixer.qk_norm:
        words["qk_layernorm"] = True
    if mixer.sinks:
        words["softmax_type"] = "learnable"
    return words


def _window_words(facts: Decoder) -> dict[str, Any]:
    mixers = [layer.mixer for layer in facts.layers]
    windows = [m.window if isinstance(m, Attention) else 0 for m in mixers]
    if not any(windows):
        return {}
    words: dict[str, Any] = {"window_size": [max(windows), 0]}
    if not all(windows):
        words["window_attn_skip_freq"] = [int(w > 0) for w in windows]
    return words


def _moe_words(facts: Decoder, moe: Moe | None) -> dict[str, Any]:
    if moe is None:
        return {}
    words: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
    }
    pattern = [int(isinstance(layer.ffn, Moe)) for layer in facts.layers]
    if not all(pattern):
        words["moe_layer_freq"] = pattern
    if moe.shared_ffn_hidden_size:
        words["moe_shared_expert_intermediate_size"] = moe.shared_ffn_hidden_size
    if moe.shared_gate:
        words["moe_shared_expert_gate"] = True
    if moe.correction_bias:
        words["moe_router_enable_expert_bias"] = True
    if moe.correction_bias or moe.topk == 1:
        # A softmax over one chosen expert is 1 whatever it scores: Llama 4 scores by sigmoids.
        words["moe_router_score_function"] = "sigmoid"
    return words


_BEYOND: Final = {
    "index_topk": "an indexer that picks what is attended to",
    "output_gate": "a gate on what attention returns",
}


def beyond_words(model: Model) -> list[str]:
    """Return what of a model no word here says: a launch that shapes it would train another one."""
    facts = model.facts
    if facts is None:
        return []
    mixers = {layer.mixer for layer in facts.layers}
    found = [text for name, text in _BEYOND.items() if any(getattr(m, name, 0) for m in mixers)]
    softmax = [m for m in mixers if isinstance(m, Attention)]
    if any(m.qk_norm in ("whole", "weightless") for m in softmax):
        found.append("norms of queries and keys that span all heads or have no weights")
    if not facts.learned_positions and any(not m.rope for m in softmax):
        found.append("attention without rotary positions")
    if facts.embedding_norm:
        found.append("a norm after the embedding")
    if facts.head_bias:
        found.append("a bias in the output layer")
    return found


def published_words(model: Model) -> dict[str, Any]:
    """Return words of a known model's config that its shape and cost do not hold.

    Rotary base and scaling, the epsilon of its norms, groups and scale of its router; of another
    model nothing is known.
    """
    if model.name not in known_names() or load_model(model.name).num_params != model.num_params:
        return {}
    config = load_config(model.name)
    words: dict[str, Any] = {
        word: kind(config[key])
        for key, (word, kind) in _PUBLISHED.items()
        if isinstance(config.get(key), int | float) and (model.is_moe or not word.startswith("moe"))
    }
    scaling: Any = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "llama3":
        words |= {"use_rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}
    elif kind == "yarn" and model.is_mla:
        words |= {"rope_type": "yarn", "rotary_scaling_factor": float(scaling["factor"])}
        words |= {k: float(scaling[k]) for k in ("mscale", "mscale_all_dim") if k in scaling}
    return words


_PUBLISHED: Final[dict[str, tuple[str, type[int] | type[float]]]] = {
    "rope_theta": ("rotary_base", int),
    "rms_norm_eps": ("layernorm_epsilon", float),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor", float),
    "n_group": ("moe_router_num_groups", int),
    "topk_group": ("moe_router_group_topk", int),
}
"""A key of a Hugging Face config -> the word and its type."""


def unwritable(model: Model) -> MeshwrightError | None:
    """Return why Megatron Core's GPT cannot express the model, or None when it can."""
    try:
        model_words(model)
    except MeshwrightError as error:
        return error
    return None

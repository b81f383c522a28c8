"""Rules of hybrid models, whose layers and stages are written as a pattern of letters."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Rule,
    Settings,
    change,
    derive,
    error,
)

_HYBRID_LAYERS = set("MG*D+-E")


def _main_pattern(s: Settings) -> str:
    return (s.hybrid_layer_pattern or "").split("/")[0]


def _hybrid_override(s: Settings) -> object:
    return (
        s.hybrid_layer_pattern is None
        and s.hybrid_override_pattern is not None
        and {"hybrid_layer_pattern": s.hybrid_override_pattern}
    )


def _hybrid_letters(s: Settings) -> object:
    unknown = sorted(set(_main_pattern(s)) - _HYBRID_LAYERS - {"|"})
    return unknown and {"letter": unknown[0]}


def _hybrid_mixes_attention(s: Settings) -> object:
    pattern = set(_main_pattern(s))
    return "*" in pattern and pattern & {"D", "+"}


def _hybrid_layers(s: Settings) -> object:
    if s.hybrid_layer_pattern is None:
        return None
    return {"num_layers": len(_main_pattern(s).replace("|", ""))}


def _already_written(setting: str, id: str, line: int, *, with_bars: bool = False) -> Rule:
    """A pattern says itself what ``setting`` says; ``with_bars``: only when it has stages."""
    return error(
        id,
        f"validate_args:{line}",
        setting,
        lambda s: (
            s.hybrid_layer_pattern is not None
            and getattr(s, setting) is not None
            and getattr(s, setting) is not False
            and ("|" in _main_pattern(s) or not with_bars)
        ),
        "Stages and virtual stages are written with '|' in --hybrid-layer-pattern.",
        f"Drop {{write[{setting}]}}.",
    )


def hybrid_segments(s: Settings) -> int:
    """Return the pipeline stages that the pattern spells; 0 without a pattern."""
    return _main_pattern(s).count("|") + 1 if s.hybrid_layer_pattern is not None else 0


def _hybrid_segments_wrong(s: Settings) -> object:
    segments = hybrid_segments(s)
    return segments > 1 and segments % s.pp and {"segments": segments}


def _hybrid_mtp(s: Settings) -> object:
    depths = (s.hybrid_layer_pattern or "").split("/")[1:]
    if not depths or not any(depths):
        return None
    return {"mtp_num_layers": len(depths)}


RULES = (
    error(
        "MLM-ARG-hyb_override",
        "validate_args:746",
        "hybrid_override_pattern",
        lambda s: s.hybrid_override_pattern is not None and s.hybrid_layer_pattern is not None,
        "--hybrid-override-pattern is the old name of --hybrid-layer-pattern.",
        "Drop it.",
    ),
    derive("validate_args:747", _hybrid_override),
    error(
        "MLM-ARG-hyb_letters",
        "validate_args:795",
        "hybrid_layer_pattern",
        _hybrid_letters,
        "{letter!r} is no layer: M Mamba, G gated delta net, * attention, D sparse attention, "
        "+ latent attention, - MLP, E experts.",
        "Use these letters, and '|' between stages.",
        final=True,
    ),
    error(
        "MLM-ARG-hyb_attention",
        "validate_args:796",
        "hybrid_layer_pattern",
        _hybrid_mixes_attention,
        "Attention (*) excludes latent (+) and sparse (D) attention in one model.",
        "Use one kind.",
    ),
    change(
        "MLM-ARG-hyb_layers",
        "validate_args:797",
        "num_layers",
        _hybrid_layers,
        "The number of layers comes from the pattern: {num_layers}.",
        "Drop --num-layers, or make the pattern as long.",
    ),
    _already_written("decoder_first_pipeline_num_layers", "MLM-ARG-hyb_first", 804, with_bars=True),
    _already_written("decoder_last_pipeline_num_layers", "MLM-ARG-hyb_last", 809, with_bars=True),
    _already_written("num_layers_per_virtual_pipeline_stage", "MLM-ARG-hyb_lpv", 814),
    _already_written("num_virtual_stages_per_pipeline_rank", "MLM-ARG-hyb_vpp", 820),
    _already_written("pipeline_model_parallel_layout", "MLM-ARG-hyb_layout", 825),
    _already_written("account_for_embedding_in_pipeline_split", "MLM-ARG-hyb_emb", 829),
    _already_written("account_for_loss_in_pipeline_split", "MLM-ARG-hyb_loss", 834),
    error(
        "MLM-ARG-hyb_segments",
        "validate_args:849",
        "hybrid_layer_pattern",
        _hybrid_segments_wrong,
        "The pattern has {segments} stages; they must be a multiple of pp = {pp}.",
        "Write pp, or a multiple of it, stages separated by '|'.",
        final=True,
    ),
    derive("validate_args:870", _hybrid_mtp),
)

"""Rules of unequal stages: layout strings, ends of their own size, counted embedding and loss."""

from __future__ import annotations

from typing import Any

from meshwright.errors import LayoutError
from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    derive,
    divisors_near,
    error,
    indivisible,
)
from meshwright.parallel.pipeline_layout import read_pipeline_layout


def layout_stages(s: Settings) -> tuple[str, ...]:
    """Return the stages of the layout string; none without one, or when it is unreadable."""
    if s.pipeline_model_parallel_layout is None:
        return ()
    try:
        return read_pipeline_layout(s.pipeline_model_parallel_layout)
    except LayoutError:
        return ()


def _unreadable_layout(s: Settings) -> object:
    if s.pipeline_model_parallel_layout is None:
        return None
    try:
        read_pipeline_layout(s.pipeline_model_parallel_layout)
    except LayoutError as refused:
        return {"why": refused.rule, "how": refused.remedy}
    return None


def _layout_stages(s: Settings) -> object:
    stages = layout_stages(s)
    return len(stages) % s.pp and {"stages": len(stages)}


def _middle(s: Settings) -> tuple[int, int]:
    first: int | None = s.decoder_first_pipeline_num_layers
    last: int | None = s.decoder_last_pipeline_num_layers
    layers = s.num_layers - (first or 0) - (last or 0)
    return layers, s.pp - (first is not None) - (last is not None)


def split_unevenly(s: Settings) -> bool:
    """Say whether the ends have their own number of layers and no layout overrides them."""
    return s.uneven and s.pipeline_model_parallel_layout is None


def _middle_mismatch(s: Settings) -> object:
    layers, ranks = _middle(s)
    return bool(layers) != bool(ranks) and {"layers": layers, "ranks": ranks}


def _middle_indivisible(s: Settings) -> object:
    layers, ranks = _middle(s)
    return ranks and layers % ranks and {"layers": layers, "ranks": ranks}


def _middle_not_interleaved(s: Settings) -> object:
    layers, ranks = _middle(s)
    if not ranks or layers % ranks or s.vpp is None:
        return None
    return indivisible(layers // ranks, s.vpp) and {"each": layers // ranks}


def _accounted(s: Settings) -> bool:
    counted = s.account_for_embedding_in_pipeline_split or s.account_for_loss_in_pipeline_split
    return bool(counted) and not s.uneven and s.pipeline_model_parallel_layout is None


def _accounted_indivisible(s: Settings) -> object:
    return (
        _accounted(s)
        and s.counted_layers % s.pp
        and {"counted": s.counted_layers, "pp_choices": divisors_near(s.counted_layers, s.pp)}
    )


def _accounted_not_interleaved(s: Settings) -> object:
    if not _accounted(s) or s.vpp is None or s.counted_layers % s.pp:
        return None
    each = s.counted_layers // s.pp
    return indivisible(each, s.vpp) and {
        "counted": s.counted_layers,
        "each": each,
        "vpp_choices": divisors_near(each, s.vpp),
    }


def _letters(s: Settings) -> str:
    return "".join(layout_stages(s))


def _layers_in_layout(s: Settings) -> object:
    count = _letters(s).count("t")
    return bool(layout_stages(s)) and count != s.num_layers and {"count": count}


def _mtp_in_layout(s: Settings) -> object:
    count = _letters(s).count("m")
    return bool(layout_stages(s)) and count != (s.mtp_num_layers or 0) and {"count": count}


def _mtp_stages(s: Settings) -> list[int]:
    return [i for i, stage in enumerate(layout_stages(s)) if "m" in stage]


def _mtp_before_last_chunk(s: Settings) -> bool:
    return any(i < len(layout_stages(s)) - s.pp for i in _mtp_stages(s))


def _chunks_of_layout(s: Settings) -> dict[str, Any] | None:
    """Virtual stages as the layout has them; MTP stands alone when before the last rank."""
    stages = layout_stages(s)
    if not stages or len(stages) % s.pp:
        return None
    chunks = len(stages) // s.pp
    alone = any("m" in stage for stage in stages[-s.pp : -1])
    vpp = chunks if s.vpp is None and chunks > 1 else s.vpp
    return {"virtual_pipeline_model_parallel_size": vpp, "mtp_standalone": alone}


def _detected_chunks(s: Settings) -> object:
    chunks = len(layout_stages(s)) // s.pp
    return bool(layout_stages(s)) and s.vpp is not None and s.vpp != chunks and {"chunks": chunks}


RULES = (
    error(
        "MLM-LAYOUT-chars",
        "validate_args:940",
        "pipeline_model_parallel_layout",
        _unreadable_layout,
        "{why}",
        "{how}",
        final=True,
    ),
    error(
        "MLM-ARG-layout_stages",
        "validate_args:945",
        "pipeline_model_parallel_layout",
        _layout_stages,
        "The layout has {stages} stages; they must be a multiple of pp = {pp}.",
        "Write pp*vpp stages.",
        final=True,
    ),
    error(
        "MLM-TC-uneven_acc",
        "transformer_config:2235",
        "decoder_first_pipeline_num_layers",
        lambda s: (
            s.uneven
            and (s.account_for_embedding_in_pipeline_split or s.account_for_loss_in_pipeline_split)
        ),
        "Uneven stages exclude counting the embedding or the loss as a layer.",
        "Use one of the two, or a layout.",
    ),
    error(
        "MLM-TC-layout_conflict",
        "transformer_config:2252",
        "pipeline_model_parallel_layout",
        lambda s: (
            s.pipeline_model_parallel_layout is not None
            and (
                s.uneven
                or s.account_for_embedding_in_pipeline_split
                or s.account_for_loss_in_pipeline_split
            )
        ),
        "A layout says where everything sits: it excludes uneven stages and counting the "
        "embedding or the loss.",
        "Keep the layout alone.",
    ),
    error(
        "MLM-LAYOUT-chars",
        "transformer_config:2270",
        "pipeline_model_parallel_layout",
        _unreadable_layout,
        "{why}",
        "{how}",
    ),
    error(
        "MLM-LAYOUT-div",
        "transformer_config:2271",
        "pipeline_model_parallel_layout",
        _layout_stages,
        "The layout has {stages} stages; they must be a multiple of pp = {pp}.",
        "Write pp*vpp stages.",
    ),
    derive("transformer_config:2285", _chunks_of_layout),
    error(
        "MLM-TC-layout_vpp",
        "transformer_config:2280",
        "virtual_pipeline_model_parallel_size",
        _detected_chunks,
        "The layout has {chunks} virtual stages a rank, not "
        "{virtual_pipeline_model_parallel_size}.",
        "Leave the virtual stages out.",
    ),
    error(
        "MLM-LAYOUT-first_embedding",
        "transformer_config:2290",
        "pipeline_model_parallel_layout",
        lambda s: bool(layout_stages(s)) and not _letters(s).startswith("E"),
        "The first letter of a layout is E, the embedding.",
        "Start with E.",
    ),
    error(
        "MLM-LAYOUT-last_loss",
        "transformer_config:2291",
        "pipeline_model_parallel_layout",
        lambda s: bool(layout_stages(s)) and not _letters(s).endswith("L"),
        "The last letter of a layout is L, the loss.",
        "End with L.",
    ),
    error(
        "MLM-LAYOUT-one_embedding",
        "transformer_config:2292",
        "pipeline_model_parallel_layout",
        lambda s: _letters(s).count("E") > 1,
        "A layout has one E.",
        "Write E once, first.",
    ),
    error(
        "MLM-LAYOUT-one_loss",
        "transformer_config:2293",
        "pipeline_model_parallel_layout",
        lambda s: _letters(s).count("L") > 1,
        "A layout has one L.",
        "Write L once, last.",
    ),
    error(
        "MLM-LAYOUT-layers",
        "transformer_config:2294",
        "pipeline_model_parallel_layout",
        _layers_in_layout,
        "The layout has {count} layers (t), the model {num_layers}.",
        "Write t {num_layers} times.",
        repeats=("MLM-ARG-hyb_layout",),
    ),
    error(
        "MLM-LAYOUT-mtp_count",
        "transformer_config:2295",
        "pipeline_model_parallel_layout",
        _mtp_in_layout,
        "The layout has {count} MTP layers (m), the model {mtp_num_layers}.",
        "Write m as often as {write[mtp_num_layers]} says.",
    ),
    error(
        "MLM-LAYOUT-mtp_order",
        "transformer_config:2296",
        "pipeline_model_parallel_layout",
        lambda s: "t" in _letters(s).partition("m")[2],
        "MTP layers (m) follow all other layers.",
        "Write every m after the last t.",
    ),
    error(
        "MLM-LAYOUT-mtp_last_vpp",
        "transformer_config:2297",
        "pipeline_model_parallel_layout",
        _mtp_before_last_chunk,
        "MTP layers sit in the last virtual stage of their rank.",
        "Write m in one of the last {pp} stages.",
    ),
    error(
        "MLM-LAYOUT-mtp_together",
        "transformer_config:2298",
        "pipeline_model_parallel_layout",
        lambda s: len(_mtp_stages(s)) > 1,
        "All MTP layers sit in one stage.",
        "Write every m in the same stage.",
    ),
    error(
        "MLM-TC-first_pos",
        "transformer_config:2304",
        "decoder_first_pipeline_num_layers",
        lambda s: (
            split_unevenly(s)
            and s.decoder_first_pipeline_num_layers is not None
            and (s.decoder_first_pipeline_num_layers or 0) <= 0
        ),
        "The first stage holds at least one layer.",
        "Use 1 or more.",
    ),
    error(
        "MLM-TC-first_vpp",
        "transformer_config:2312",
        "decoder_first_pipeline_num_layers",
        lambda s: (
            split_unevenly(s)
            and s.decoder_first_pipeline_num_layers is not None
            and s.vpp is not None
            and indivisible(s.decoder_first_pipeline_num_layers or 0, s.vpp)
        ),
        "The layers of the first stage, {decoder_first_pipeline_num_layers}, must be a multiple "
        "of vpp = {virtual_pipeline_model_parallel_size}.",
        "Use a multiple of it.",
    ),
    error(
        "MLM-TC-last_pos",
        "transformer_config:2323",
        "decoder_last_pipeline_num_layers",
        lambda s: (
            split_unevenly(s)
            and s.decoder_last_pipeline_num_layers is not None
            and (s.decoder_last_pipeline_num_layers or 0) <= 0
        ),
        "The last stage holds at least one layer.",
        "Use 1 or more.",
    ),
    error(
        "MLM-TC-last_vpp",
        "transformer_config:2331",
        "decoder_last_pipeline_num_layers",
        lambda s: (
            split_unevenly(s)
            and s.decoder_last_pipeline_num_layers is not None
            and s.vpp is not None
            and indivisible(s.decoder_last_pipeline_num_layers or 0, s.vpp)
        ),
        "The layers of the last stage, {decoder_last_pipeline_num_layers}, must be a multiple of "
        "vpp = {virtual_pipeline_model_parallel_size}.",
        "Use a multiple of it.",
    ),
    error(
        "MLM-TC-uneven_middle",
        "transformer_config:2342",
        "decoder_first_pipeline_num_layers",
        lambda s: split_unevenly(s) and _middle_mismatch(s),
        "{layers} layers are left for {ranks} middle stages; either both are 0 or neither.",
        "Choose first and last so that they add up (with pp = 2 and both given, to {num_layers}).",
    ),
    error(
        "MLM-TC-uneven_div",
        "transformer_config:2350",
        "decoder_first_pipeline_num_layers",
        lambda s: split_unevenly(s) and _middle_indivisible(s),
        "The remaining {layers} layers must split over {ranks} middle stages.",
        "Change the first or the last stage by the remainder.",
        repeats=("MLM-TC-first_pos", "MLM-TC-last_pos", "MLM-TC-uneven_acc"),
    ),
    error(
        "MLM-TC-uneven_vpp",
        "transformer_config:2364",
        "num_virtual_stages_per_pipeline_rank",
        lambda s: split_unevenly(s) and _middle_not_interleaved(s),
        "The {each} layers of a middle stage must be a multiple of vpp = "
        "{virtual_pipeline_model_parallel_size}.",
        "Choose first, last and vpp so that they are.",
    ),
    error(
        "MLM-TC-acc_pp",
        "transformer_config:2383",
        "num_layers",
        lambda s: s.vpp is None and _accounted_indivisible(s),
        "{counted} layers, embedding and loss included, do not split over pp = {pp}.",
        "Use pp = {pp_choices}, or a layout.",
        repeats=("MLM-ARG-layers_pp", "MLM-ARG-lpv_layers_pp"),
    ),
    error(
        "MLM-TC-acc_pp_vpp",
        "transformer_config:2396",
        "num_layers",
        lambda s: s.vpp is not None and _accounted_indivisible(s),
        "{counted} layers, embedding and loss included, do not split over pp = {pp}.",
        "Use pp = {pp_choices}, or a layout.",
        repeats=("MLM-ARG-layers_pp", "MLM-ARG-lpv_layers_pp"),
    ),
    error(
        "MLM-TC-acc_vpp",
        "transformer_config:2409",
        "num_virtual_stages_per_pipeline_rank",
        _accounted_not_interleaved,
        "The {each} layers of a rank ({counted} over {pp}, embedding and loss included) must be "
        "a multiple of vpp = {virtual_pipeline_model_parallel_size}.",
        "Use vpp = {vpp_choices}.",
    ),
)

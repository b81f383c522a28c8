"""Rules of the sequence: its length, positions, and how ranks share it."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import (
    Settings,
    change,
    derive,
    error,
    is_list,
    multiples_near,
)


def _no_rope(s: Settings) -> object:
    freq: object = s.no_rope_freq
    return isinstance(freq, int) and freq > 0 and s.num_layers % freq


def _no_rope_length(s: Settings) -> object:
    freq: object = s.no_rope_freq
    return is_list(freq) and len(freq) not in (0, s.num_layers)


def _cp_kinds(s: Settings) -> object:
    kinds: object = s.cp_comm_type
    if s.cp <= 1 or not is_list(kinds):
        return None
    return len(kinds) != s.num_layers and {"kinds": len(kinds)}


def _sequence_not_split(s: Settings) -> object:
    local = s.seq_length // s.cp
    return (
        s.sequence_parallel
        and local % s.tp
        and {
            "local": local,
            "nearest": multiples_near(s.seq_length, s.tp * s.cp),
        }
    )


RULES = (
    error(
        "MLM-ARG-seq_2cp",
        "validate_args:1336",
        "seq_length",
        lambda s: (
            s.seq_length is not None
            and s.cp > 1
            and s.seq_length % (2 * s.cp)
            and {"unit": 2 * s.cp, "nearest": multiples_near(s.seq_length, 2 * s.cp)}
        ),
        "Context parallelism cuts a sequence into 2*cp = {unit} pieces of equal length; "
        "{seq_length} is no multiple.",
        "Use {nearest}.",
    ),
    change(
        "MLM-ARG-document_mask",
        "validate_args:1340",
        "create_attention_mask_in_dataloader",
        lambda s: (
            s.dataloader_inter_document_masking and {"create_attention_mask_in_dataloader": False}
        ),
        "Masking between documents replaces the mask made by the data loader.",
        severity="note",
    ),
    error(
        "MLM-ARG-seq_encoder",
        "validate_args:1347",
        "encoder_seq_length",
        lambda s: s.seq_length is not None and s.encoder_seq_length is not None,
        "The sequence length is given twice.",
        "Drop --encoder-seq-length.",
    ),
    error(
        "MLM-ARG-seq_given",
        "validate_args:1350",
        "seq_length",
        lambda s: s.seq_length is None and s.encoder_seq_length is None,
        "The sequence length is mandatory.",
        "Add --seq-length.",
        final=True,
    ),
    derive(
        "validate_args:1351",
        lambda s: s.seq_length is None and {"seq_length": s.encoder_seq_length},
    ),
    error(
        "MLM-ARG-maxpos",
        "validate_args:1354",
        "max_position_embeddings",
        lambda s: s.max_position_embeddings < s.seq_length,
        "The position embeddings ({max_position_embeddings}) cover the sequence ({seq_length}).",
        "Use --max-position-embeddings {seq_length} or more.",
    ),
    error(
        "MLM-ARG-maxpos_dec",
        "validate_args:1358",
        "max_position_embeddings",
        lambda s: (
            s.decoder_seq_length is not None and s.max_position_embeddings < s.decoder_seq_length
        ),
        "The position embeddings ({max_position_embeddings}) cover the decoder's sequence "
        "({decoder_seq_length}).",
        "Use --max-position-embeddings {decoder_seq_length} or more.",
    ),
    derive(
        "config_from_args:339.5",
        lambda s: len(s.cp_comm_type) == 1 and {"cp_comm_type": s.cp_comm_type[0]},
    ),
    error(
        "MLM-TC-cp_list",
        "transformer_config:3105",
        "cp_comm_type",
        _cp_kinds,
        "{kinds} kinds of context parallel communication for {num_layers} layers.",
        "Give one for all layers, or one a layer.",
    ),
    error(
        "MLM-TC-sym_ar",
        "transformer_config:3134",
        "symmetric_ar_type",
        lambda s: s.symmetric_ar_type is not None and not s.site.te_at_least(2, 3),
        "The all-reduce over symmetric memory needs Transformer Engine 2.3.",
        "Install it, or drop {write[symmetric_ar_type]}.",
    ),
    error(
        "MLM-TC-norope_div",
        "transformer_config:3141",
        "no_rope_freq",
        _no_rope,
        "The {num_layers} layers must be a multiple of {no_rope_freq}.",
        "Choose a divisor of {num_layers}.",
    ),
    error(
        "MLM-TC-norope_len",
        "transformer_config:3150",
        "no_rope_freq",
        _no_rope_length,
        "The pattern has one entry for each of the {num_layers} layers.",
        "Write {num_layers} entries.",
    ),
    error(
        "MLM-SP-seq_split",
        "sp_shape:72",
        "seq_length",
        _sequence_not_split,
        "The {local} tokens of a rank (sequence over cp = {cp}) must split over tp = {tp} under "
        "sequence parallelism.",
        "Use a sequence of {nearest}.",
    ),
)

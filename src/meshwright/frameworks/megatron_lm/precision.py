"""Rules of precision: 16-bit training, FP8, FP4, and the dtypes of the optimizer."""

from __future__ import annotations

from meshwright.frameworks.megatron_lm.rules import Settings, change, error, warning


def _fp8_edges_too_many(s: Settings, which: str) -> object:
    if not (s.fp8 and s.first_last_layers_bf16):
        return None
    most = s.num_layers // s.pp
    return not 0 <= getattr(s, which) <= most and {"most": most}


def _fp32(dtype: object) -> bool:
    return dtype in ("fp32", None)


def _transformer_engine_adam_missing(s: Settings) -> bool:
    return s.use_precision_aware_optimizer and not s.optimizer_cpu_offload and not s.site.te_version


def _padding_on(s: Settings) -> object:
    return s.moe_router_padding_for_fp8 and {"moe_router_padding_for_quantization": True}


RULES = (
    error(
        "MLM-ARG-fp8pg",
        "validate_args:1096",
        "fp8_param_gather",
        lambda s: (
            s.fp8_param_gather
            and not s.use_distributed_optimizer
            and not s.use_torch_fsdp2
            and not s.use_megatron_fsdp
        ),
        "Gathering FP8 parameters needs sharded optimizer states.",
        "Add --use-distributed-optimizer, or drop --fp8-param-gather.",
    ),
    error(
        "MLM-ARG-fp4_fp8",
        "validate_args:1101",
        "fp4",
        lambda s: s.fp4 and s.fp8,
        "FP4 and FP8 exclude each other.",
        "Keep one of --fp4-format and --fp8-format.",
    ),
    error(
        "MLM-ARG-fp4pg",
        "validate_args:1105",
        "fp4_param_gather",
        lambda s: s.fp4_param_gather and not s.fp4,
        "Gathering FP4 parameters needs FP4 training.",
        "Add --fp4-format e2m1.",
    ),
    error(
        "MLM-ARG-fp4_te",
        "validate_args:1109",
        "fp4",
        lambda s: s.fp4 and not s.site.te_at_least(2, 7),
        "FP4 needs Transformer Engine 2.7 or newer.",
        "Install it, or train in FP8 or bf16.",
    ),
    error(
        "MLM-ARG-fp16_bf16",
        "validate_args:1196",
        "fp16",
        lambda s: s.fp16 and s.bf16,
        "fp16 and bf16 exclude each other.",
        "Keep --bf16.",
    ),
    change(
        "MLM-ARG-fp16_nan",
        "validate_args:1201",
        "check_for_nan_in_loss_and_grad",
        lambda s: s.fp16 and not s.loss_scale and {"check_for_nan_in_loss_and_grad": False},
        "Under dynamic loss scaling the check for NaN is off.",
        "Use --bf16, or a fixed --loss-scale.",
    ),
    error(
        "MLM-ARG-acc_fp32_grads",
        "validate_args:1210",
        "main_grads_dtype",
        lambda s: s.bf16 and s.accumulate_allreduce_grads_in_fp32 and s.main_grads_dtype != "fp32",
        "Accumulating gradients in fp32 needs fp32 main gradients, not {main_grads_dtype}.",
        "Drop --accumulate-allreduce-grads-in-fp32 or --main-grads-dtype.",
    ),
    change(
        "MLM-ARG-bf16_acc",
        "validate_args:1217",
        "accumulate_allreduce_grads_in_fp32",
        lambda s: (
            s.bf16
            and {
                "accumulate_allreduce_grads_in_fp32": not s.grad_reduce_in_bf16
                and (s.accumulate_allreduce_grads_in_fp32 or s.main_grads_dtype == "fp32")
            }
        ),
        "With bf16 the gradient buffer is fp32 (4 bytes a parameter) unless gradients are reduced "
        "in bf16.",
        "Count it, or add --grad-reduce-in-bf16.",
        severity="note",
    ),
    error(
        "MLM-ARG-fp16_ce",
        "validate_args:1373",
        "fp16_lm_cross_entropy",
        lambda s: s.fp16_lm_cross_entropy and not s.fp16,
        "The fp16 cross entropy is for fp16 training.",
        "Drop --fp16-lm-cross-entropy.",
    ),
    error(
        "MLM-ARG-fp32_res",
        "validate_args:1375",
        "fp32_residual_connection",
        lambda s: s.fp32_residual_connection and not (s.fp16 or s.bf16),
        "An fp32 residual stream is for 16-bit training.",
        "Add --bf16.",
    ),
    error(
        "MLM-ARG-offload_prec",
        "validate_args:1885",
        "optimizer_cpu_offload",
        lambda s: s.optimizer_cpu_offload and not s.use_precision_aware_optimizer,
        "Offloading the optimizer builds on the precision-aware one.",
        "Add --use-precision-aware-optimizer.",
    ),
    error(
        "MLM-ARG-offload_fp8",
        "validate_args:1889",
        "fp8_recipe",
        lambda s: s.optimizer_cpu_offload and s.fp8_param_gather and s.fp8_recipe != "delayed",
        "Offloading the optimizer gathers FP8 parameters with delayed scaling only, not "
        "{fp8_recipe}.",
        "Use --fp8-recipe delayed, or drop --fp8-param-gather.",
    ),
    error(
        "MLM-TC-fp16_bf16",
        "transformer_config:1433",
        "fp16",
        lambda s: s.fp16 and s.bf16,
        "fp16 and bf16 exclude each other.",
        "Keep bf16.",
        repeats=("MLM-ARG-fp16_bf16",),
    ),
    error(
        "MLM-TC-fp8_fl_delayed",
        "transformer_config:1530",
        "first_last_layers_bf16",
        lambda s: s.fp8 and s.first_last_layers_bf16 and s.fp8_recipe == "delayed",
        "Delayed scaling cannot leave the first and last layers in bf16.",
        "Use {write[fp8_recipe=tensorwise]}, or drop {write[first_last_layers_bf16]}.",
    ),
    error(
        "MLM-TC-fp8_fl_start",
        "transformer_config:1543",
        "num_layers_at_start_in_bf16",
        lambda s: _fp8_edges_too_many(s, "num_layers_at_start_in_bf16"),
        "The bf16 layers at the start fit one stage: 0 to {most} "
        "(layers/pp = {num_layers}/{pp}), not {num_layers_at_start_in_bf16}.",
        "Use at most {most}.",
    ),
    error(
        "MLM-TC-fp8_fl_end",
        "transformer_config:1552",
        "num_layers_at_end_in_bf16",
        lambda s: _fp8_edges_too_many(s, "num_layers_at_end_in_bf16"),
        "The bf16 layers at the end fit one stage: 0 to {most} "
        "(layers/pp = {num_layers}/{pp}), not {num_layers_at_end_in_bf16}.",
        "Use at most {most}.",
    ),
    error(
        "MLM-TC-fp8_custom",
        "transformer_config:1560",
        "fp8_quantizer_factory",
        lambda s: s.fp8 and s.fp8_recipe == "custom" and not s.fp8_quantizer_factory,
        "A custom FP8 recipe needs the path of its quantizer factory.",
        "Add {write[fp8_quantizer_factory]}.",
    ),
    error(
        "MLM-TC-fp8_param",
        "transformer_config:1567",
        "fp8_param_gather",
        lambda s: s.fp8_param_gather and not s.fp8,
        "FP8 parameters need FP8 training.",
        "Add {write[fp8=hybrid]}.",
    ),
    error(
        "MLM-TC-fp8_out",
        "transformer_config:1571",
        "fp8_output_proj",
        lambda s: s.fp8_output_proj and not s.fp8,
        "An FP8 output projection needs FP8 training.",
        "Add {write[fp8=e4m3]}.",
    ),
    error(
        "MLM-TC-fp8_out_recipe",
        "transformer_config:1573",
        "fp8_recipe",
        lambda s: s.fp8_output_proj and s.fp8 and s.fp8_recipe != "mxfp8",
        "An FP8 output projection uses the mxfp8 recipe, not {fp8_recipe}.",
        "Use {write[fp8_recipe=mxfp8]}.",
    ),
    error(
        "MLM-TC-fp4_param",
        "transformer_config:1579",
        "fp4_param_gather",
        lambda s: s.fp4_param_gather and not s.fp4,
        "FP4 parameters need FP4 training.",
        "Add {write[fp4=e2m1]}.",
        repeats=("MLM-ARG-fp4pg",),
    ),
    error(
        "MLM-TC-fp4_fp8",
        "transformer_config:1582",
        "fp4",
        lambda s: s.fp4 and s.fp8,
        "FP4 and FP8 exclude each other.",
        "Keep one.",
        repeats=("MLM-ARG-fp4_fp8",),
    ),
    error(
        "MLM-TC-fp4_custom",
        "transformer_config:1586",
        "fp4_quantizer_factory",
        lambda s: s.fp4 and s.fp4_recipe == "custom" and not s.fp4_quantizer_factory,
        "A custom FP4 recipe needs the path of its quantizer factory.",
        "Add {write[fp4_quantizer_factory]}.",
    ),
    error(
        "MLM-TC-moe_fp8_te",
        "transformer_config:2630",
        "fp8",
        lambda s: s.num_experts and s.fp8 and not s.site.te_at_least(1, 7),
        "FP8 with experts needs Transformer Engine 1.7 or newer.",
        "Install it.",
    ),
    change(
        "MLM-TC-pad_fp8",
        "transformer_config:2640",
        "moe_router_padding_for_fp8",
        _padding_on,
        "--moe-router-padding-for-fp8 is the old name of --moe-router-padding-for-quantization.",
        "Use {write[moe_router_padding_for_quantization=true]}.",
    ),
    error(
        "MLM-TC-pad_quant",
        "transformer_config:2651",
        "moe_router_padding_for_quantization",
        lambda s: s.moe_router_padding_for_quantization and not (s.fp8 or s.fp4),
        "Padding for quantisation needs FP8 or FP4.",
        "Drop {write[moe_router_padding_for_quantization]}.",
    ),
    error(
        "MLM-TC-pad_quant_disp",
        "transformer_config:2656",
        "moe_token_dispatcher_type",
        lambda s: (
            s.moe_router_padding_for_quantization
            and s.moe_token_dispatcher_type in ("allgather", "alltoall_seq")
        ),
        "Padding for quantisation excludes the {moe_token_dispatcher_type} dispatcher.",
        "Use {write[moe_token_dispatcher_type=alltoall]}.",
    ),
    warning(
        "MLM-OPT-mxfp8_mem",
        "optimizer_config:421",
        "fp8_recipe",
        lambda s: s.fp8_recipe == "mxfp8" and not s.reuse_grad_buf_for_mxfp8_param_ag,
        "mxfp8 without gathering FP8 parameters through the gradient buffer takes much more "
        "memory.",
        "Use {write[fp8_param_gather=true]} and {write[reuse_grad_buf_for_mxfp8_param_ag=true]}.",
    ),
    error(
        "MLM-OPT-opgos_reuse",
        "optimizer_config:428",
        "reuse_grad_buf_for_mxfp8_param_ag",
        lambda s: (
            s.reuse_grad_buf_for_mxfp8_param_ag and s.overlap_param_gather_with_optimizer_step
        ),
        "Reusing the gradient buffer excludes gathering during the optimizer step.",
        "Keep one of the two.",
    ),
    error(
        "MLM-OPT-prec_adam",
        "optimizer_config:434",
        "optimizer",
        lambda s: s.use_precision_aware_optimizer and s.optimizer != "adam",
        "The precision-aware optimizer is Adam, not {optimizer}.",
        "Use {write[optimizer=adam]}.",
    ),
    error(
        "MLM-OPT-prec_te",
        "optimizer_config:464",
        "use_precision_aware_optimizer",
        _transformer_engine_adam_missing,
        "The precision-aware optimizer is Transformer Engine's.",
        "Install Transformer Engine, or drop {write[use_precision_aware_optimizer]}.",
    ),
    *(
        error(
            id,
            f"optimizer_config:{line}",
            name,
            lambda s, name=name: (
                not s.use_precision_aware_optimizer and not _fp32(getattr(s, name))
            ),
            f"Only the precision-aware optimizer keeps {what} in {{{name}}}.",
            "Add {write[use_precision_aware_optimizer=true]}, or keep fp32.",
        )
        for id, line, name, what in (
            ("MLM-OPT-main_grads", 469, "main_grads_dtype", "main gradients"),
            ("MLM-OPT-main_params", 472, "main_params_dtype", "main parameters"),
            ("MLM-OPT-exp_avg", 475, "exp_avg_dtype", "the first moment"),
            ("MLM-OPT-exp_avg_sq", 478, "exp_avg_sq_dtype", "the second moment"),
        )
    ),
)

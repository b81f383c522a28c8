"""What NeMo 2 refuses or changes; ids and places as of September 2025."""

from __future__ import annotations

from typing import Final

from meshwright.frameworks.by_path import Facts, Rule, expert_world, world

_S: Final = "trainer.strategy"


def _fewer_than_stages(f: Facts) -> object:
    pp = f.degree("pipeline_model_parallel_size")
    return f.gpus is not None and f.gpus < pp and {"gpus": f.gpus, "pp": pp}


def _chunks(f: Facts) -> object:
    pp, vpp = (
        f.degree("pipeline_model_parallel_size"),
        f.word("virtual_pipeline_model_parallel_size"),
    )
    layers = f.word("num_layers")
    plain = not any(
        f.word(w)
        for w in (
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
            "pipeline_model_parallel_layout",
        )
    )
    known = isinstance(layers, int) and isinstance(vpp, int) and vpp > 0
    if not plain or not known or (layers // pp) % vpp == 0:
        return None
    return {"layers": layers, "pp": pp, "vpp": vpp, "of": layers // pp}


RULES: Final = (
    Rule(
        id="NEMO-ddp_type",
        field=f"{_S}.ddp",
        broken=lambda f: (
            isinstance(f[f"{_S}.ddp"], str) and f[f"{_S}.ddp"] not in ("megatron", "pytorch")
        ),
        rule="It is megatron, pytorch or a configuration object.",
        remedy="Use megatron.",
    ),
    Rule(
        id="NEMO-fsdp_ddp",
        field=f"{_S}.fsdp",
        broken=lambda f: f.given(f"{_S}.fsdp") and f[f"{_S}.ddp"] == "pytorch",
        rule="FSDP does not go with PyTorch's DDP.",
        remedy="Leave ddp out.",
    ),
    Rule(
        id="NEMO-fsdp_pytorch",
        field=f"{_S}.fsdp",
        broken=lambda f: f[f"{_S}.fsdp"] == "pytorch",
        rule="PyTorch's FSDP2 is not available with Megatron models.",
        remedy="Use fsdp=megatron.",
    ),
    Rule(
        id="NEMO-fsdp_ckpt",
        field=f"{_S}.save_ckpt_format",
        broken=lambda f: (
            f[f"{_S}.fsdp"] == "megatron"
            and f.given(f"{_S}.save_ckpt_format")
            and f[f"{_S}.save_ckpt_format"] != "fsdp_dtensor"
        ),
        rule="Megatron-FSDP saves checkpoints as fsdp_dtensor.",
        remedy="Use save_ckpt_format=fsdp_dtensor.",
    ),
    Rule(
        id="NEMO-ckpt_params",
        field=f"{_S}.ckpt_load_main_params",
        broken=lambda f: (
            f[f"{_S}.ckpt_load_optimizer"] is True and f[f"{_S}.ckpt_load_main_params"] is True
        ),
        rule="Main parameters are part of the optimizer; only one of the two is loaded.",
        remedy="Leave ckpt_load_main_params out.",
    ),
    Rule(
        id="NEMO-encoder",
        field=f"{_S}.encoder_tensor_model_parallel_size",
        broken=lambda f: (
            f[f"{_S}.encoder_tensor_model_parallel_size"]
            or f[f"{_S}.encoder_pipeline_model_parallel_size"]
        ),
        rule="Encoders are not split separately any more.",
        remedy="Leave both encoder sizes out.",
    ),
    Rule(
        id="NEMO-world_pp",
        field=f"{_S}.pipeline_model_parallel_size",
        broken=_fewer_than_stages,
        rule="{gpus} GPUs cannot hold {pp} stages.",
        remedy="Use pipeline_model_parallel_size={gpus} or less.",
    ),
    Rule(
        id="NEMO-world",
        field=f"{_S}.tensor_model_parallel_size",
        broken=world,
        rule="{gpus} GPUs are no multiple of tp*pp*cp = {unit}.",
        remedy="Use {near} GPUs, or other degrees.",
    ),
    Rule(
        id="NEMO-expert",
        field=f"{_S}.expert_model_parallel_size",
        broken=expert_world,
        rule="{gpus} GPUs are no multiple of etp*ep*pp = {unit}.",
        remedy="Use {near} GPUs, or a smaller expert_model_parallel_size.",
    ),
    Rule(
        id="NEMO-chunks",
        field=f"{_S}.virtual_pipeline_model_parallel_size",
        broken=_chunks,
        rule="{vpp} virtual stages do not divide the {layers} // {pp} = {of} layers of a stage.",
        remedy="Use a divisor of {of}.",
    ),
    Rule(
        id="NEMO-rng",
        field="model.config.enable_cuda_graph",
        broken=lambda f: (
            f["model.config.enable_cuda_graph"] is True
            and f["model.config.use_te_rng_tracker"] is not True
        ),
        rule="CUDA graphs need Transformer Engine's random number tracker.",
        remedy="Set use_te_rng_tracker=True.",
    ),
    Rule(
        id="NEMO-group_default",
        field=f"{_S}.microbatch_group_size_per_vp_stage",
        broken=lambda f: (
            f.word("virtual_pipeline_model_parallel_size")
            and not f.given(f"{_S}.microbatch_group_size_per_vp_stage")
        ),
        rule="Left out, pp microbatches in a row run on one virtual stage.",
        severity="note",
    ),
)

"""What torchtitan refuses or changes; ids of the August 2026 snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from meshwright.describe.model import Model
from meshwright.frameworks.by_path import Breach, Facts, Rule, below, near_multiples

_P: Final = "parallelism"
_TOKENS: Final = "training.num_tokens_per_microbatch_per_dp_rank"
_STEP: Final = "training.num_tokens_per_train_step"
_SINGLE: Final = ("1F1B", "GPipe")
_V: Final = ("ZBVZeroBubble", "DualPipeV")


def _dp_shard(f: Facts) -> int | None:
    """Return the shard degree in effect: -1 takes the rest of the world."""
    shard = f.whole(f"{_P}.data_parallel_shard_degree")
    if shard != -1:
        return shard
    unit = f.model_parallel * max(f.whole(f"{_P}.data_parallel_replicate_degree") or 1, 1)
    return None if f.gpus is None or f.gpus < unit else f.gpus // unit


def _product(f: Facts) -> object:
    shard, replicate = _dp_shard(f), f.whole(f"{_P}.data_parallel_replicate_degree") or 1
    if f.gpus is None:
        return None
    product = f.model_parallel * replicate * (shard or 1)
    if product == f.gpus:
        return None
    rest = f.model_parallel * max(replicate, 1)
    fits = f.gpus % rest == 0
    remedy = f"Use data_parallel_shard_degree={f.gpus // rest} or -1." if fits else ""
    near = near_multiples(f.gpus, rest)
    return {
        "product": product,
        "gpus": f.gpus,
        "remedy": remedy or f"Use {near} GPUs, or other degrees.",
    }


def _ep(f: Facts) -> object:
    ep, shard = f.whole(f"{_P}.expert_parallel_degree"), _dp_shard(f)
    if ep is None or ep < 1 or shard is None or shard < 1:
        return None
    ranks = shard * f.degree("context_parallel_size") * f.degree("tensor_model_parallel_size")
    return ranks % ep and {"ranks": ranks, "near": math.gcd(ranks, ep)}


def _balancer(f: Facts) -> object:
    path = f"{_P}.context_parallel_load_balancer"
    return f.given(path) and f[path] not in ("headtail", "ptrr", "")


def _sequence(f: Facts) -> object:
    tokens = f.whole(_TOKENS)
    if tokens is None or tokens < 1:
        return None
    tp, cp = f.degree("tensor_model_parallel_size"), f.degree("context_parallel_size")
    sp = f.word("sequence_parallel") is not False
    unit = (tp if sp else 1) * (2 * cp if cp > 1 else 1)
    return tokens % unit and {"unit": unit, "near": near_multiples(tokens, unit)}


def _step(f: Facts) -> object:
    step, tokens, dp = f.whole(_STEP), f.whole(_TOKENS), f.dp
    if step is None or step < 1 or tokens is None or tokens < 1 or dp is None:
        return None
    pp = f.degree("pipeline_model_parallel_size") > 1
    micro = (f.whole(f"{_P}.num_pp_microbatches") or 1) if pp else 1
    unit = tokens * max(micro, 1) * dp
    return step % unit and {"unit": unit, "near": near_multiples(step, unit)}


def _local_batch(f: Facts) -> object:
    total, local, dp = (
        f.whole("training.global_batch_size"),
        f.whole("training.local_batch_size"),
        f.dp,
    )
    if total is None or total < 1 or local is None or local < 1 or dp is None:
        return None
    return total % (local * dp) and {"unit": local * dp, "near": near_multiples(total, local * dp)}


def _stages(f: Facts) -> dict[str, Any] | None:
    """Return the numbers of stages, when model and split are known."""
    pp, model = f.degree("pipeline_model_parallel_size"), f.model
    each = f.whole(f"{_P}.pipeline_parallel_layers_per_stage")
    first = f.whole(f"{_P}.pipeline_parallel_first_stage_less_layers") or 0
    last = f.whole(f"{_P}.pipeline_parallel_last_stage_less_layers") or 0
    if pp == 1 or model is None:
        return None
    counted = model.num_layers + first + last
    schedule = f[f"{_P}.pipeline_parallel_schedule"]
    stages = pp * (1 if schedule in _SINGLE else 2)
    if each is not None and each > 0:
        stages = -(-counted // each)
    return {
        "stages": stages,
        "pp": pp,
        "counted": counted,
        "schedule": schedule,
        "given": each is not None,
        "first": first,
        "last": last,
        "least": counted // max(stages, 1),
    }


def _stage_rule(test: Callable[[dict[str, Any]], bool]) -> Breach:
    def broken(f: Facts) -> object:
        numbers = _stages(f)
        return numbers is not None and test(numbers) and numbers

    return broken


def _few_micro(f: Facts) -> object:
    numbers, micro = _stages(f), f.whole(f"{_P}.num_pp_microbatches")
    if numbers is None or micro is None or f.whole(_TOKENS) is None:
        return None
    return micro < numbers["stages"] and {**numbers, "micro": micro}


def _batch_below_stages(f: Facts) -> object:
    local, pp = f.whole("training.local_batch_size"), f.degree("pipeline_model_parallel_size")
    micro = f.whole(f"{_P}.pipeline_parallel_microbatch_size") or 1
    if local is None or pp == 1 or micro < 1 or local // micro >= pp:
        return None
    return {"local": local, "pp": pp, "micro": micro}


def _head_rule(test: Callable[[Model, int], bool]) -> Breach:
    def broken(f: Facts) -> object:
        model, tp = f.model, f.degree("tensor_model_parallel_size")
        if model is None or not model.num_heads or not test(model, tp):
            return None
        return {"heads": model.num_heads, "kv": model.num_kv_heads, "name": model.name}

    return broken


def _experts_below_tp(f: Facts) -> object:
    ep, tp = f.degree("expert_model_parallel_size"), f.degree("tensor_model_parallel_size")
    return f.model is not None and f.model.is_moe and ep < tp and {"ep": ep, "tp": tp}


def _experts(f: Facts) -> object:
    model, ep = f.model, f.degree("expert_model_parallel_size")
    if model is None or not model.is_moe or model.num_experts % ep == 0:
        return None
    return {"experts": model.num_experts, "near": math.gcd(model.num_experts, ep)}


def _context(f: Facts) -> object:
    model, length = f.model, f.whole("training.max_context_length")
    if model is None or length is None or not model.max_seq_len or length <= model.max_seq_len:
        return None
    return {"most": model.max_seq_len}


def _tied(f: Facts) -> object:
    model = f.model
    pp = f.degree("pipeline_model_parallel_size")
    return model is not None and model.tie_word_embeddings and pp > 1


def _counts_tokens(f: Facts) -> bool:
    """Say whether this is a release of 2026: those count tokens, not sequences."""
    return f.given(_TOKENS)


def _cp_attention(f: Facts) -> object:
    backend = f["model.attn_backend"]
    name = str(f.word("model") or "")
    split = f.degree("context_parallel_size") > 1
    return split and _counts_tokens(f) and "flex" not in str(backend or name)


def _symmetric_memory(f: Facts) -> object:
    wanted = f[f"{_P}.enable_fsdp_symm_mem"] is True
    return wanted and f.site.device_capability < (9, 0)


def _taken_shard(f: Facts) -> object:
    shard = _dp_shard(f)
    auto = f.whole(f"{_P}.data_parallel_shard_degree") == -1
    return auto and shard is not None and shard > 1 and {"shard": shard}


def _default_stages(f: Facts) -> object:
    numbers = _stages(f)
    if numbers is None or numbers["given"]:
        return None
    return {**numbers, "each": numbers["stages"] // numbers["pp"]}


def _uneven_shards(f: Facts) -> object:
    """Return the widths that do not split evenly over the ranks that share parameters."""
    model, shard = f.model, _dp_shard(f)
    ranks = (shard or 0) * f.degree("context_parallel_size")
    if model is None or ranks < 2:
        return None
    tp = f.degree("tensor_model_parallel_size")
    widths = {
        "vocabulary": model.vocab_size // tp,
        "hidden size": model.hidden_size,
        "query heads": model.num_heads * model.head_dim // tp,
        "key-value heads": model.num_kv_heads * model.head_dim // tp,
    }
    uneven = [f"{name} {size}" for name, size in widths.items() if size % ranks]
    return uneven and {"uneven": ", ".join(uneven), "ranks": ranks}


def _graphs_on(f: Facts) -> bool:
    """Say whether CUDA graphs are on: by default, in the releases that count tokens."""
    off = f["training.disable_cuda_graphs"]
    return off is False or (off is None and f.whole(_TOKENS) is not None)


RULES: Final = (
    *(
        Rule(
            id="TT-DIM-positive",
            field=f"{_P}.{name}",
            broken=below(f"{_P}.{name}"),
            rule="It is at least 1.",
            remedy="Use 1 or more.",
        )
        for name in (
            "data_parallel_replicate_degree",
            "context_parallel_degree",
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "expert_parallel_degree",
        )
    ),
    Rule(
        id="TT-DIM-dp_shard",
        field=f"{_P}.data_parallel_shard_degree",
        broken=lambda f: (
            (f.whole(f"{_P}.data_parallel_shard_degree") or 0) < 1
            and f.whole(f"{_P}.data_parallel_shard_degree") != -1
        ),
        rule="It is -1, which takes the rest of the world, or at least 1.",
        remedy="Use -1.",
    ),
    Rule(
        id="TT-CFG-tokens_pos",
        field=_TOKENS,
        broken=below(_TOKENS),
        rule="It is at least 1.",
        remedy="Use the context length.",
    ),
    Rule(
        id="TT-CFG-step_tokens",
        field=_STEP,
        broken=lambda f: (
            f.whole(_STEP) is not None and (f.whole(_STEP) or 0) < 1 and f.whole(_STEP) != -1
        ),
        rule="It is -1 or at least 1.",
        remedy="Use -1.",
    ),
    Rule(
        id="TT-CFG-context_pos",
        field="training.max_context_length",
        broken=below("training.max_context_length"),
        rule="It is at least 1.",
        remedy="Use 8192.",
    ),
    Rule(
        id="TT-CFG-spmd",
        field=f"{_P}.spmd_backend",
        broken=lambda f: (
            f.given(f"{_P}.spmd_backend")
            and f[f"{_P}.spmd_backend"] not in ("partial_dtensor", "spmd_types")
        ),
        rule="The backend is partial_dtensor or spmd_types.",
        remedy="Use spmd_types.",
    ),
    Rule(
        id="TT-CFG-balancer",
        field=f"{_P}.context_parallel_load_balancer",
        broken=lambda f: f[f"{_P}.context_parallel_load_balancer"] == "",
        rule="It is a name, not an empty text.",
        remedy="Use headtail, or None to switch it off.",
    ),
    Rule(
        id="TT-CFG-symm",
        field=f"{_P}.enable_fsdp_symm_mem",
        broken=_symmetric_memory,
        rule="Symmetric memory needs a GPU of compute capability 9.0 or newer.",
        remedy="Leave it out.",
    ),
    Rule(
        id="TT-CFG-async_tp",
        field="compile.enable_async_tensor_parallel",
        broken=lambda f: (
            f["compile.enable_async_tensor_parallel"] is True and f["compile.enable"] is not True
        ),
        rule="Asynchronous tensor parallelism is made by the compiler.",
        remedy="Add --compile.enable.",
    ),
    Rule(
        id="TT-DIM-product",
        field=f"{_P}.data_parallel_shard_degree",
        broken=_product,
        rule="dp_replicate*dp_shard*cp*tp*pp = {product} is not the {gpus} GPUs; CP counts, EP"
        " does not.",
        remedy="{remedy}",
    ),
    Rule(
        id="TT-DIM-dp_shard_auto",
        field=f"{_P}.data_parallel_shard_degree",
        broken=_taken_shard,
        rule="It takes the rest of the world: {shard}.",
        severity="note",
    ),
    Rule(
        id="TT-DIM-ep",
        field=f"{_P}.expert_parallel_degree",
        broken=_ep,
        rule="It divides dp_shard*cp*tp = {ranks}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="TT-CP-spmd",
        field=f"{_P}.spmd_backend",
        broken=lambda f: (
            f.degree("context_parallel_size") > 1 and f[f"{_P}.spmd_backend"] == "partial_dtensor"
        ),
        rule="Context parallelism needs the spmd_types backend.",
        remedy="Use spmd_types.",
    ),
    Rule(
        id="TT-CP-balancer",
        field=f"{_P}.context_parallel_load_balancer",
        broken=_balancer,
        rule="The balancer is headtail, ptrr or None.",
        remedy="Use headtail.",
    ),
    Rule(
        id="TT-MODEL-tie_pp",
        field=f"{_P}.pipeline_parallel_degree",
        broken=_tied,
        rule="The model ties its embeddings, which pipeline stages cannot share.",
        remedy="Use 1.",
    ),
    Rule(
        id="TT-MODEL-cp_attn",
        field="model.attn_backend",
        broken=lambda f: f.given("model.attn_backend") and _cp_attention(f),
        rule="Context parallelism needs FlexAttention.",
        remedy="Use flex.",
    ),
    Rule(
        id="TT-MODEL-cp_attn",
        field=f"{_P}.context_parallel_degree",
        broken=lambda f: not f.given("model.attn_backend") and _cp_attention(f),
        rule="Context parallelism needs FlexAttention, which the model's configuration chooses.",
        remedy="Take a configuration whose attn_backend is flex.",
        severity="warning",
    ),
    Rule(
        id="TT-MODEL-heads_tp",
        field=f"{_P}.tensor_parallel_degree",
        broken=_head_rule(lambda m, tp: m.num_heads % tp != 0),
        rule="It divides the {heads} attention heads of {name}.",
        remedy="Use a divisor of {heads}.",
    ),
    Rule(
        id="TT-MODEL-kv_tp",
        field=f"{_P}.tensor_parallel_degree",
        broken=_head_rule(lambda m, tp: m.num_heads % tp == 0 and m.num_kv_heads % tp != 0),
        rule="It divides the {kv} key-value heads of {name}; they are not copied.",
        remedy="Use a divisor of {kv}.",
    ),
    Rule(
        id="ep_is_at_least_tp",
        field=f"{_P}.expert_parallel_degree",
        broken=_experts_below_tp,
        rule="Versions after August 2026 refuse experts split over fewer ranks than tensors:"
        " ep = {ep}, tp = {tp}.",
        remedy="Use expert_parallel_degree={tp}.",
        severity="warning",
    ),
    Rule(
        id="TT-MODEL-experts_ep",
        field=f"{_P}.expert_parallel_degree",
        broken=_experts,
        rule="It divides the {experts} experts.",
        remedy="Use {near}.",
    ),
    Rule(
        id="TT-MODEL-context_max",
        field="training.max_context_length",
        broken=_context,
        rule="The model takes at most {most} tokens.",
        remedy="Use {most} or less.",
    ),
    Rule(
        id="TT-TRAIN-pp_support",
        field=f"{_P}.pipeline_parallel_degree",
        broken=lambda f: (
            f.degree("pipeline_model_parallel_size") > 1 and str(f.word("model")).startswith("flux")
        ),
        rule="torchtitan does not cut this model into pipeline stages.",
        remedy="Use 1.",
    ),
    Rule(
        id="TT-TRAIN-pp_micro",
        field=f"{_P}.num_pp_microbatches",
        broken=below(f"{_P}.num_pp_microbatches"),
        rule="It is at least 1.",
        remedy="Use the number of stages or more.",
    ),
    Rule(
        id="TT-TRAIN-batch_inv",
        field="debug.batch_invariant",
        broken=lambda f: f["debug.batch_invariant"] is True,
        rule="Batch invariance is for inference, not for pre-training.",
        remedy="Leave it out.",
    ),
    Rule(
        id="TT-TRAIN-typecheck_pp",
        field="debug.spmd_typechecking",
        broken=lambda f: (
            f["debug.spmd_typechecking"] is True and f.degree("pipeline_model_parallel_size") > 1
        ),
        rule="Type checking excludes pipeline parallelism.",
        remedy="Leave it out.",
    ),
    Rule(
        id="TT-TRAIN-budget_ac",
        field="activation_checkpoint.mode",
        broken=lambda f: (
            f["activation_checkpoint.mode"] == "memory_budget" and f["compile.enable"] is not True
        ),
        rule="A memory budget is kept by the compiler.",
        remedy="Add --compile.enable, or use full.",
    ),
    Rule(
        id="TT-TRAIN-graph_pp",
        field="training.disable_cuda_graphs",
        broken=lambda f: f.degree("pipeline_model_parallel_size") > 1 and _graphs_on(f),
        rule="CUDA graphs, which are on by default, exclude pipeline parallelism.",
        remedy="Add --training.disable_cuda_graphs.",
    ),
    Rule(
        id="TT-TRAIN-graph_ep",
        field="training.disable_cuda_graphs",
        broken=lambda f: f.degree("expert_model_parallel_size") > 1 and _graphs_on(f),
        rule="CUDA graphs, which are on by default, need a dispatcher of fixed shape with EP > 1.",
        remedy="Add --training.disable_cuda_graphs, or change the dispatcher.",
    ),
    Rule(
        id="TT-TRAIN-seq_div",
        field=_TOKENS,
        broken=_sequence,
        rule="It is a multiple of (tp with sequence parallelism) * (2*cp when cp > 1) = {unit}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="TT-TRAIN-step_div",
        field=_STEP,
        broken=_step,
        rule="It is a multiple of tokens a microbatch * microbatches * dp = {unit}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="global_batch_divides",
        field="training.global_batch_size",
        broken=_local_batch,
        rule="It is a multiple of local batch * dp = {unit}.",
        remedy="Use {near}.",
    ),
    Rule(
        id="TT-PP-stages_div",
        field=f"{_P}.pipeline_parallel_layers_per_stage",
        broken=_stage_rule(lambda n: n["given"] and n["stages"] % n["pp"] != 0),
        rule="{counted} layers, embedding and head counted, make {stages} stages: no multiple of"
        " pp = {pp}.",
        remedy="Choose it so that the stages are a multiple of {pp}.",
    ),
    Rule(
        id="TT-PP-single",
        field=f"{_P}.pipeline_parallel_schedule",
        broken=_stage_rule(
            lambda n: (
                n["schedule"] in _SINGLE and n["stages"] % n["pp"] == 0 and n["stages"] != n["pp"]
            )
        ),
        rule="{schedule} runs one stage a rank; there are {stages} for {pp} ranks.",
        remedy="Use Interleaved1F1B, or more layers a stage.",
    ),
    Rule(
        id="TT-PP-multi",
        field=f"{_P}.pipeline_parallel_schedule",
        broken=_stage_rule(
            lambda n: n["schedule"] not in _SINGLE and n["given"] and n["stages"] < 2 * n["pp"]
        ),
        rule="{schedule} runs at least two stages a rank; there are {stages} for {pp} ranks.",
        remedy="Use 1F1B, or fewer layers a stage.",
    ),
    Rule(
        id="v_schedule_stages",
        field=f"{_P}.pipeline_parallel_schedule",
        broken=_stage_rule(lambda n: n["schedule"] in _V and n["stages"] > 2 * n["pp"]),
        rule="{schedule} runs exactly two stages a rank; there are {stages} for {pp} ranks.",
        remedy="Use twice as many stages as ranks.",
    ),
    Rule(
        id="TT-PP-too_many",
        field=f"{_P}.pipeline_parallel_degree",
        broken=_stage_rule(lambda n: n["stages"] > n["counted"]),
        rule="{stages} stages are more than the {counted} layers.",
        remedy="Use fewer stages.",
    ),
    Rule(
        id="TT-PP-in_weight",
        field=f"{_P}.pipeline_parallel_first_stage_less_layers",
        broken=_stage_rule(lambda n: n["stages"] <= n["counted"] and n["first"] > n["least"]),
        rule="The first stage cannot go without more than its {least} layers.",
        remedy="Use {least} or less.",
    ),
    Rule(
        id="TT-PP-out_weight",
        field=f"{_P}.pipeline_parallel_last_stage_less_layers",
        broken=_stage_rule(lambda n: n["stages"] <= n["counted"] and n["last"] > n["least"]),
        rule="The last stage cannot go without more than its {least} layers.",
        remedy="Use {least} or less.",
    ),
    Rule(
        id="pp_batch_below_stages",
        field="training.local_batch_size",
        broken=_batch_below_stages,
        rule="{local} sequences in microbatches of {micro} are fewer than the {pp} stages: the"
        " schedule cannot run, or hangs.",
        remedy="Raise the local batch to {pp} or more, or use context or tensor parallelism.",
    ),
    Rule(
        id="TT-PP-few_micro",
        field=f"{_P}.num_pp_microbatches",
        broken=_few_micro,
        rule="{micro} microbatches are fewer than the {stages} stages: most of them idle.",
        remedy="Use {stages} or more.",
        severity="warning",
    ),
    Rule(
        id="TT-COMM-ngpu",
        field="comm.mode",
        broken=lambda f: (
            f["comm.mode"] in ("fake_backend", "local_tensor") and not f.site.env.get("NGPU")
        ),
        rule="A dry run takes the number of GPUs from NGPU.",
        remedy="Export NGPU.",
    ),
    Rule(
        id="TT-PP-default_stages",
        field=f"{_P}.pipeline_parallel_schedule",
        broken=_default_stages,
        rule="Without layers a stage, each rank gets {each}: {stages} stages.",
        severity="note",
    ),
    Rule(
        id="shards_are_uneven",
        field=f"{_P}.data_parallel_shard_degree",
        broken=_uneven_shards,
        rule="{uneven} do not split evenly over {ranks} ranks; uneven shards have cost memory, and"
        " cached state dictionaries of them have resumed with a worse loss.",
        remedy="Use a degree that divides them, or no state dictionary cache.",
        severity="warning",
    ),
)

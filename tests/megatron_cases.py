"""Megatron-LM command lines of the oracle as cases for the rules over layouts."""

from __future__ import annotations

from typing import Any

from meshwright.checks import Case
from meshwright.describe.cluster import build_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, LatentAttention, Layer, Mlp, Moe
from meshwright.describe.job import PRECISIONS, Execution, Job
from meshwright.describe.model import Model
from meshwright.parallel.layout import CpComm, Layouts, Recompute, layout, table, with_columns
from meshwright.parallel.pipeline_layout import read_pipeline_layout

OTHER_MODELS = {
    "hybrid-layer-pattern",
    "hybrid-override-pattern",
    "heterogeneous-layers-config-path",
    "heterogeneous-layers-config-encoded-json",
    "experimental-attention-variant",
    "spec",
}
OTHER_SHARDING = {
    "tensor-parallel-num-weight-shards",
    "expert-tensor-parallel-num-weight-shards",
    "use-torch-fsdp2",
    "hybrid-context-parallel",
    "decrease-batch-size-if-needed",
}


class Flags:
    """The flags of a command line, each with its values."""

    def __init__(self, argv: list[str]) -> None:
        self.values: dict[str, list[str]] = {}
        last: list[str] = []
        for word in argv:
            if word.startswith("--"):
                last = self.values.setdefault(word[2:], [])
            else:
                last.append(word)

    def on(self, name: str) -> bool:
        return name in self.values

    def text(self, name: str, default: str = "") -> str:
        return (self.values.get(name) or [default])[0]

    def number(self, name: str, default: int = 0) -> int:
        return int(self.text(name) or default)


def case_of(row: dict[str, Any]) -> Case | None:
    """Return the layout, model and job of a command line; None where it has none of ours."""
    flags = Flags(row["argv"])
    if (OTHER_MODELS | OTHER_SHARDING) & set(flags.values):
        return None
    try:
        model = model_of(flags)
        if model is None:
            return None
        x = layout_of(flags, model, row["world_size"])
        job = job_of(flags, x)
    except (ValueError, ZeroDivisionError):
        return None
    return Case(model, job, x, build_cluster("H100", row["world_size"], nearest=True))


def job_of(flags: Flags, x: Layouts) -> Job:
    return Job(
        seq_len=flags.number("seq-length", flags.number("encoder-seq-length", 1)),
        gbs=flags.number("global-batch-size", int(x.mbs[0] * x.dp[0])),
        precision=PRECISIONS[precision_of(flags)],
        execution=Execution(
            overlap_ep_comm=flags.on("overlap-moe-expert-parallel-comm"),
            overlap_pp_comm=not flags.on("no-overlap-p2p-communication"),
            grouped_gemm=flags.on("moe-grouped-gemm"),
            shared_expert_overlap=flags.on("moe-shared-expert-overlap"),
            activation_offload_layers=flags.number("cpu-offloading-num-layers"),
        ),
    )


def model_of(flags: Flags) -> Model | None:
    layers, hidden = flags.number("num-layers"), flags.number("hidden-size")
    heads, gated = flags.number("num-attention-heads"), flags.on("swiglu")
    frequency = flags.text("moe-layer-freq", "1")
    if not layers or not hidden or not heads or not frequency.isdigit():
        return None
    ffn = flags.number("ffn-hidden-size", 8 * hidden // 3 // 64 * 64 if gated else 4 * hidden)
    mixer: Attention | LatentAttention
    if flags.on("multi-latent-attention"):
        mixer = LatentAttention(
            num_heads=heads,
            q_lora_rank=flags.number("q-lora-rank"),
            kv_lora_rank=flags.number("kv-lora-rank", 512),
            qk_nope_head_dim=flags.number("qk-head-dim", 128),
            qk_rope_head_dim=flags.number("qk-pos-emb-head-dim", 64),
            v_head_dim=flags.number("v-head-dim", 128),
        )
    else:
        grouped = flags.on("group-query-attention")
        mixer = Attention(
            num_heads=heads,
            num_kv_heads=flags.number("num-query-groups", 1) if grouped else heads,
            head_dim=flags.number("kv-channels", hidden // heads),
        )
    dense = Layer(mixer=mixer, ffn=Mlp(ffn_hidden_size=ffn, gated=gated))
    sparse = dense
    if flags.number("num-experts"):
        moe = Moe(
            num_experts=flags.number("num-experts"),
            topk=flags.number("moe-router-topk", 2),
            ffn_hidden_size=flags.number("moe-ffn-hidden-size", ffn),
            gated=gated,
            shared_ffn_hidden_size=flags.number("moe-shared-expert-intermediate-size"),
        )
        sparse = Layer(mixer=mixer, ffn=moe)
    every = int(frequency)
    kinds = tuple(dense if i % every else sparse for i in range(layers))
    mtp = ((kinds[-1],),) * flags.number("mtp-num-layers")
    return build_decoder(
        Decoder(model_type="megatron", hidden_size=hidden, vocab_size=50304, layers=kinds, mtp=mtp)
    )


def precision_of(flags: Flags) -> str:
    if not flags.on("fp8-format"):
        return "bf16"
    recipe = flags.text("fp8-recipe", "delayed")
    return {"delayed": "fp8", "blockwise": "fp8-blockwise", "mxfp8": "fp8-mx"}.get(recipe, "fp8-cs")


def layout_of(flags: Flags, model: Model, world: int) -> Layouts:
    tp = flags.number("tensor-model-parallel-size", 1)
    pp = flags.number("pipeline-model-parallel-size", 1)
    cp = flags.number("context-parallel-size", 1)
    text = flags.text("pipeline-model-parallel-layout") or None
    sizes = flags.values.get("hierarchical-context-parallel-sizes")
    account = [flags.on(f"account-for-{end}-in-pipeline-split") for end in ("embedding", "loss")]
    vpp = flags.number("num-virtual-stages-per-pipeline-rank", 1)
    if flags.on("num-layers-per-virtual-pipeline-stage"):
        per_chunk = flags.number("num-layers-per-virtual-pipeline-stage")
        vpp = max((model.num_layers + sum(account)) // pp // per_chunk, 1)
    if text and vpp == 1:
        vpp = max(len(read_pipeline_layout(text)) // pp, 1)
    comm = {"allgather": "all_gather", "a2a+p2p": "a2a_p2p"}
    named = flags.text("cp-comm-type", "p2p")
    recompute = recompute_of(flags)
    shared = layout(
        order="tp-cp-ep-pp-dp" if flags.on("use-tp-pp-dp-mapping") else "tp-cp-ep-dp-pp",
        pipeline_layout=text,
        hierarchical_cp=tuple(map(int, sizes)) if sizes else None,
    )
    return with_columns(
        table([shared]),
        tp=tp,
        pp=pp,
        cp=cp,
        dp=max(world // max(tp * pp * cp, 1), 1),
        vpp=vpp,
        ep=flags.number("expert-model-parallel-size", 1),
        etp=flags.number("expert-tensor-parallel-size", tp if model.is_moe else 1),
        mbs=flags.number("micro-batch-size", 1),
        sp=flags.on("sequence-parallel") and tp > 1,
        schedule=2 if vpp > 1 else 1,
        recompute=int(recompute),
        recompute_num_layers=flags.number("recompute-num-layers") if recompute else 0,
        cp_comm=int(CpComm[comm.get(named, named)]),
        first=flags.number("decoder-first-pipeline-num-layers"),
        last=flags.number("decoder-last-pipeline-num-layers"),
        account_for_embedding=account[0],
        account_for_loss=account[1],
        microbatch_group_size=(
            flags.number("microbatch-group-size-per-virtual-pipeline-stage") if vpp > 1 else 0
        ),
        dp_replicate=flags.number("num-distributed-optimizer-instances", 1),
    )


def recompute_of(flags: Flags) -> Recompute:
    how = "selective" if flags.on("recompute-activations") else flags.text("recompute-granularity")
    chosen = Recompute.none
    if how == "full":
        block = flags.text("recompute-method") == "block"
        chosen = Recompute.full | (Recompute.block if block else Recompute.none)
    elif how == "selective":
        for module in flags.values.get("recompute-modules", ["core_attn"]):
            if module in Recompute.__members__:
                chosen |= Recompute[module]
    return chosen

"""Hypothesis strategies of whole situations: what is trained, on what, and legal layouts of it.

A situation has a pool of legal layouts of mixed shapes; strategies draw row numbers of the pool, so
that a failing example shrinks to few and early rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from hypothesis import strategies as st

from meshwright.checks import Case, illegal
from meshwright.describe.cluster import Cluster, load_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import (
    Attention,
    Decoder,
    FeedForward,
    LatentAttention,
    Layer,
    Mamba,
    Mixer,
    Mlp,
    Moe,
)
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.model import Model
from meshwright.parallel.layout import (
    COLUMNS,
    CpComm,
    Ints,
    Layout,
    Layouts,
    Pipeline,
    Recompute,
    Zero,
    num_rows,
    row,
    table,
    take,
    with_columns,
)


def dense_model(
    *,
    num_layers: int = 16,
    hidden_size: int = 1024,
    num_heads: int = 16,
    num_kv_heads: int = 8,
    ffn_hidden_size: int = 2816,
    vocab_size: int = 32000,
    gated: bool = True,
    bias: bool = False,
    dropout: float = 0.0,
    tied: bool = False,
) -> Model:
    """Return a dense decoder of equal layers."""
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        qkv_bias=bias,
        out_bias=bias,
    )
    mlp = Mlp(ffn_hidden_size=ffn_hidden_size, gated=gated, bias=bias)
    return build_decoder(
        Decoder(
            model_type="llama",
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            layers=(Layer(mixer=attention, ffn=mlp),) * num_layers,
            norm_weights=2 if bias else 1,
            tie_word_embeddings=tied,
            hidden_dropout=dropout,
        )
    )


def gpt_model(*, num_layers: int = 16, hidden_size: int = 1024, num_heads: int = 16) -> Model:
    """Return a GPT: LayerNorm, GELU without a gate, biases, dropout, as many K and V as Q heads."""
    return dense_model(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        ffn_hidden_size=4 * hidden_size,
        gated=False,
        bias=True,
        dropout=0.1,
    )


def moe_model(
    *, num_layers: int = 16, num_experts: int = 16, dense_first: int = 0, mtp: int = 0
) -> Model:
    """Return a mixture of experts with shared experts and latent attention."""
    mixer = LatentAttention(
        num_heads=16,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
    )
    experts = Moe(num_experts=num_experts, topk=4, ffn_hidden_size=512, shared_ffn_hidden_size=512)
    sparse = Layer(mixer=mixer, ffn=experts)
    dense = Layer(mixer=mixer, ffn=Mlp(ffn_hidden_size=2816))
    return build_decoder(
        Decoder(
            model_type="deepseek_v3",
            hidden_size=1024,
            vocab_size=32000,
            layers=(dense,) * dense_first + (sparse,) * (num_layers - dense_first),
            mtp=((sparse,),) * mtp,
        )
    )


def hybrid_model() -> Model:
    """Return a hybrid of Mamba, attention and plain MLP layers."""
    mamba = Layer(
        mixer=Mamba(num_heads=32, head_dim=64, state_size=128, num_groups=8, conv_kernel=4)
    )
    attention = Layer(mixer=Attention(num_heads=16, num_kv_heads=4, head_dim=64))
    mlp = Layer(ffn=Mlp(ffn_hidden_size=4096, gated=False))
    return build_decoder(
        Decoder(
            model_type="nemotron_h",
            hidden_size=1024,
            vocab_size=32000,
            layers=(mamba, mlp, mamba, attention) * 4,
        )
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Situation:
    """A model, a cluster and a job, with a pool of legal layouts."""

    name: str
    model: Model
    cluster: Cluster
    job: Job
    pipeline_layout: str | None = None

    def __repr__(self) -> str:
        return self.name

    @cached_property
    def pool(self) -> Layouts:
        """Legal layouts of mixed shapes, always the same ones."""
        return legal(self, candidates(self))

    def rows(self, at: list[int]) -> Layouts:
        """Return some layouts of the pool."""
        return take(self.pool, np.array(at, dtype=np.intp))


def legal(s: Situation, x: Layouts) -> Layouts:
    """Return the rows that no rule forbids."""
    case = Case(model=s.model, job=s.job, x=x, cluster=s.cluster)
    return take(x, np.flatnonzero(~illegal(case)))


def candidates(s: Situation, count: int = 60_000) -> Layouts:
    """Return layouts that fill the cluster, drawn evenly from every choice."""
    draw = np.random.default_rng(7)
    gpus = s.cluster.num_gpus
    small = [d for d in (1, 2, 3, 4, 6, 8, 16) if gpus % d == 0]

    def some(values: list[int]) -> Ints:
        return draw.choice(np.array(values, dtype=np.int64), count)

    recomputes = [int(r) for r in Recompute if r < Recompute.full]
    full = int(Recompute.full)
    column = {
        **{name: some(small) for name in ("tp", "cp", "pp")},
        "vpp": some([1, 1, 2, 4]),
        "ep": some(small) if s.model.is_moe else np.ones(count, np.int64),
        "etp": some([1, 2]) if s.model.is_moe else np.ones(count, np.int64),
        "mbs": some([1, 2, 4]),
        "dp_replicate": some([1, 1, 2]),
        "sp": some([0, 1]),
        "zero": some([int(z) for z in Zero]),
        "recompute": some([0, 0, full, full, full | int(Recompute.block), *recomputes]),
        "schedule": some([int(k) for k in Pipeline]),
        "cp_comm": some([int(c) for c in CpComm]),
        "account_for_embedding": some([0, 0, 1]),
        "account_for_loss": some([0, 0, 1]),
        "first": some([0, 0, 0, 1]),
        "last": some([0, 0, 0, 2]),
        "microbatch_group_size": np.zeros(count, np.int64),
    }
    column["dp"] = np.maximum(gpus // (column["tp"] * column["cp"] * column["pp"]), 1)
    if s.pipeline_layout is not None:
        for name in ("first", "last", "account_for_embedding", "account_for_loss"):
            column[name] = np.zeros(count, np.int64)
    layers = some([0, 1, 2])
    is_full = (column["recompute"] & full) != 0
    is_block = (column["recompute"] & int(Recompute.block)) != 0
    column["recompute_num_layers"] = np.where(is_full, np.where(is_block, layers + 1, layers), 0)
    x = Layout[Ints](**{c: column[c] for c in COLUMNS}, pipeline_layout=s.pipeline_layout)
    fills = x.world_size == gpus
    meshes = (x.tp * x.cp * x.dp) % (x.ep * x.etp) == 0
    return take(x, np.flatnonzero(fills & meshes))


def _situation(
    name: str, model: Model, cluster: str, job: Job, layout: str | None = None
) -> Situation:
    return Situation(
        name=name, model=model, cluster=load_cluster(cluster), job=job, pipeline_layout=layout
    )


@cache
def all_situations() -> tuple[Situation, ...]:
    """Return one situation for each kind of model, precision and task."""
    plain = Job(seq_len=4096, gbs=192)
    unfused = Execution(flash_attention=False, fused_cross_entropy=False, cuda_graphs="full")
    return (
        _situation("dense", dense_model(), "64xH100", plain),
        _situation("gpt", gpt_model(), "16xA100-40GB", replace(plain, execution=unfused)),
        _situation("tied", dense_model(num_layers=14, tied=True), "3x4xH200", plain),
        _situation("moe", moe_model(dense_first=2), "64xH100", plain),
        _situation(
            "moe-mtp",
            moe_model(mtp=1),
            "64xGB200",
            replace(plain, precision=precision("fp8-mx"), gbs=256),
        ),
        _situation("hybrid", hybrid_model(), "32xB200", plain),
        _situation("lora", dense_model(), "8xH100", replace(plain, task="lora")),
        _situation("spelled", dense_model(), "16xH100", plain, "Etttt|ttttt|tttt|tttL"),
    )


situations = st.deferred(lambda: st.sampled_from(all_situations()))


def layouts_of(s: Situation) -> st.SearchStrategy[Layout[int]]:
    """Return a strategy of single legal layouts of a situation."""
    return st.integers(0, num_rows(s.pool) - 1).map(lambda at: row(s.pool, at))


@st.composite
def situations_with_rows(
    draw: st.DrawFn, min_rows: int = 1, max_rows: int = 40
) -> tuple[Situation, list[int]]:
    """Draw a situation and numbers of rows of its pool: a table of mixed shapes (``s.rows``)."""
    s = draw(situations)
    last = num_rows(s.pool) - 1
    rows = st.lists(st.integers(0, last), min_size=min_rows, max_size=max_rows, unique=True)
    return s, draw(rows)


@st.composite
def situations_with_layout(draw: st.DrawFn) -> tuple[Situation, Layout[int]]:
    """Draw a situation and one of its legal layouts."""
    s = draw(situations)
    return s, draw(layouts_of(s))


_MIXERS: list[Mixer] = [
    Attention(num_heads=8, num_kv_heads=8, head_dim=64),
    Attention(num_heads=8, num_kv_heads=2, head_dim=32, qk_norm="head", window=512, sinks=True),
    Attention(num_heads=8, num_kv_heads=1, head_dim=64, output_gate=True, qkv_bias=True),
    LatentAttention(
        num_heads=8,
        q_lora_rank=0,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    Mamba(num_heads=16, head_dim=32, state_size=64, num_groups=8, conv_kernel=4),
]
_FFNS: list[FeedForward] = [
    Mlp(ffn_hidden_size=1024),
    Mlp(ffn_hidden_size=1536, gated=False, bias=True),
    Moe(num_experts=8, topk=2, ffn_hidden_size=256),
]


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Draw a small decoder: any order of any mixers and feed-forward networks."""
    layer = st.builds(
        Layer,
        mixer=st.sampled_from(_MIXERS),
        ffn=st.sampled_from(_FFNS),
        norms=st.sampled_from(["pre", "post", "sandwich"]),
    )
    facts = Decoder(
        model_type="drawn",
        hidden_size=512,
        vocab_size=draw(st.sampled_from([1000, 32000])),
        layers=tuple(draw(st.lists(layer, min_size=4, max_size=4))),
        norm_weights=draw(st.sampled_from([1, 2])),
        tie_word_embeddings=draw(st.booleans()),
        hidden_dropout=draw(st.sampled_from([0.0, 0.1])),
        learned_positions=draw(st.sampled_from([0, 4096])),
    )
    return build_decoder(facts)


def changed(x: Layout[int], **columns: int) -> Layouts:
    """Return a layout with some columns changed, as a table of one row."""
    return with_columns(table([x]), **columns)

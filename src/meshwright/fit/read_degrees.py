"""Settings of a measured run -> parallel degrees and batch; what is left out is supplied."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from meshwright.describe.model import Model
from meshwright.errors import LayoutError
from meshwright.fit.framework import Framework
from meshwright.fit.settings import Settings
from meshwright.parallel.layout import minimum_world_size

MOST_GPUS = 2**20
"""No run uses more; a larger number is a typing error."""

NODE_GPUS = 8
"""A row without a number of GPUs ran on one node, ..."""
LARGE_RUN_NODES, LARGE_MODEL_PARAMS = 16, 10e9
"""... or on several, where its model is large: Megatron-LM tests its releases on 16 or 32."""

ACCUMULATION = (
    "grad_accum",
    "gradient_accumulation_steps",
    "num_microbatches",
    "microbatches_per_pipeline",
)
"""Settings that say how many micro-batches a rank runs in a step."""

GROUP_SIZE = (
    "microbatch_group_size_per_virtual_pipeline_stage",
    "microbatch_group_size_per_vp_stage",
)


@dataclass(frozen=True)
class Degrees:
    """The parallel degrees of a row, and its batch."""

    tp: int
    cp: int
    pp: int
    vpp: int
    ep: int
    etp: int
    mbs: int
    gbs: int
    num_gpus: int

    @property
    def dp(self) -> int:
        """Return the ranks of a data-parallel group."""
        return self.num_gpus // (self.tp * self.cp * self.pp)


def read_degrees(s: Settings, framework: Framework, model: Model, seq_len: int) -> Degrees:
    """Return the degrees of a row; what it leaves out is supplied and listed.

    Raises ``LayoutError`` where they cannot hold together.
    """
    tp, cp, pp, ep = (_degree(s, name) for name in ("tp", "cp", "pp", "ep"))
    if s.number("ep") is None:
        ep = _dispatching_ranks(s, model, pp)
    etp = _expert_tensor(s, framework, tp, ep)
    unit = minimum_world_size(tp, cp, pp, ep, etp)
    num_gpus = _gpus(s, model, tp * cp * pp, unit)
    if num_gpus % unit:
        if etp > 1 and num_gpus % minimum_world_size(tp, cp, pp, ep, 1) == 0:
            etp = 1
            s.assumed.append("etp = 1: experts of a larger etp do not fit the GPUs")
        else:
            rule = f"It is a multiple of pp*lcm(tp*cp, ep*etp) = {unit}."
            raise LayoutError("n_gpus", num_gpus, rule, _nearest_multiples(num_gpus, unit))
    dp = num_gpus // (tp * cp * pp)
    mbs, gbs = _batch(s, framework, dp, pp, seq_len)
    return Degrees(
        tp, cp, pp, _chunks(s, model, pp, gbs // (mbs * dp)), ep, etp, mbs, gbs, num_gpus
    )


def _gpus(s: Settings, model: Model, dense: int, unit: int) -> int:
    """Return the number of GPUs: stated, or told by dp, or what such runs use."""
    stated, dp = s.number("n_gpus"), s.number("dp")
    if stated is None and dp is not None and dp >= 1:
        stated = dp * dense
        s.assumed.append(f"n_gpus = {stated}: dp = {dp} of {dense} GPUs")
    elif stated is not None and dp is not None and dp * dense != stated:
        s.assumed.append(f"dp = {dp} contradicts {stated} GPUs and is not used")
    if stated is None:
        is_large = model.num_params > LARGE_MODEL_PARAMS
        node = s.number("gpus_per_node") or (4 if s.cell("system").startswith("GB") else NODE_GPUS)
        usual = LARGE_RUN_NODES * node if is_large else NODE_GPUS
        stated = -(-usual // unit) * unit
        s.assumed.append(f"n_gpus = {stated}: not stated")
    if not 1 <= stated <= MOST_GPUS:
        rule = f"A run has 1 to {MOST_GPUS:,} GPUs."
        raise LayoutError("n_gpus", stated, rule, _nearest_multiples(stated, unit))
    return stated


def _nearest_multiples(number: int, unit: int) -> str:
    below = min(number, MOST_GPUS) // unit * unit
    near = [n for n in (below, below + unit) if 0 < n <= MOST_GPUS]
    return f"Use {' or '.join(map(str, near))}." if near else "Use smaller degrees."


def _degree(s: Settings, name: str) -> int:
    value = s.number(name)
    if value is None:
        s.assumed.append(f"{name} = 1: not stated")
        return 1
    if not 1 <= value <= MOST_GPUS:
        rule = f"A degree is a whole number from 1 to {MOST_GPUS:,}."
        raise LayoutError(name, value, rule, "Use 1.")
    return value


def _dispatching_ranks(s: Settings, model: Model, pp: int) -> int:
    """Return the expert-parallel ranks of a row that names a dispatcher and no degree.

    DeepEP and HybridEP only serve expert parallelism: it is then over all ranks of a stage, or as
    many of them as divide the experts.
    """
    kernels, num_gpus = s.text("kernels", "features"), s.number("n_gpus")
    if num_gpus is None or not model.is_moe or not re.search("deepep|hybridep", kernels):
        return 1
    ep = math.gcd(num_gpus // pp, model.num_experts)
    s.assumed.append(f"ep = {ep}: not stated, all ranks that the dispatcher serves")
    return ep


def _expert_tensor(s: Settings, framework: Framework, tp: int, ep: int) -> int:
    value = s.number("etp")
    if value is not None and value >= 1:
        return min(value, MOST_GPUS)
    return tp if ep > 1 and framework.expert_tensor_is_tensor else 1


def _batch(s: Settings, framework: Framework, dp: int, pp: int, seq_len: int) -> tuple[int, int]:
    """Return micro-batch and global batch, whole micro-batches on every rank."""
    mbs, gbs, turns = s.number("mbs"), s.number("gbs"), s.whole(*ACCUMULATION)
    if mbs is None and gbs is not None and turns > 0 and gbs % (dp * turns) == 0 < gbs:
        mbs = gbs // (dp * turns)
        s.assumed.append(f"mbs = {mbs}: {turns} micro-batches on each of {dp} ranks")
    if mbs is None:
        cuts = pp if framework.microbatch_for_each_rank else 0
        mbs = _micro_batch(gbs, dp, pp, seq_len, cuts)
        s.assumed.append(f"mbs = {mbs}: not stated")
    if gbs is None and turns > 0:
        gbs = mbs * dp * turns
        s.assumed.append(f"gbs = {gbs}: {turns} micro-batches on each of {dp} ranks")
    elif gbs is None:
        gbs = mbs * dp * pp
        s.assumed.append(f"gbs = {gbs}: not stated, as many micro-batches as pipeline ranks")
    for name, value in (("gbs", gbs), ("mbs", mbs)):
        if not 1 <= value < 2**40:
            raise LayoutError(name, value, "Batches hold at least one sequence.", "Use 1 or more.")
    if gbs < mbs and mbs % (gbs * dp) == 0:
        s.assumed.append(f"gbs = {mbs}, mbs = {gbs}: stated the other way round")
        mbs, gbs = gbs, mbs
    if gbs % (mbs * dp):
        near = max(round(gbs / (mbs * dp)), 1) * mbs * dp
        s.assumed.append(f"gbs {gbs} is read as {near}, whole micro-batches on {dp} ranks")
        gbs = near
    return mbs, gbs


def _micro_batch(gbs: int | None, dp: int, pp: int, seq_len: int, cuts: int) -> int:
    """Return the micro-batch taken where none is stated: 1 in a pipeline, else up to 8k tokens.

    torchtitan's pipelines cut the batch of a rank into as many micro-batches as they have ranks:
    ``cuts``, or 0.
    """
    if pp > 1 and cuts and gbs and gbs % (dp * cuts) == 0:
        return gbs // (dp * cuts)
    if pp > 1 or gbs is None or gbs <= dp:
        return 1
    most = max(8192 // seq_len, 1)
    return max(m for m in range(1, most + 1) if (gbs // dp) % m == 0)


def _chunks(s: Settings, model: Model, pp: int, num_microbatches: int) -> int:
    """Return the model chunks of a pipeline rank: stated, told by the layers, or the most."""
    most = model.num_layers + len(model.mtp_layers) + 2
    if pp > most:
        rule = f"{model.num_layers} layers, embedding and loss fill at most {most} stages."
        raise LayoutError("pp", pp, rule, f"Use {model.num_layers} or fewer.")
    value = _stated_chunks(s, model, pp)
    if value is not None and value >= 1:
        return _usable_chunks(s, value, pp, num_microbatches, most)
    if pp == 1:
        return 1
    per_rank = model.num_layers // pp
    vpp = 2 if "interleaved" in s.text("pp_schedule") and num_microbatches >= pp else 1
    if model.num_layers % pp == 0 and num_microbatches % pp == 0:
        chunks = range(1, per_rank + 1)
        vpp = max((v for v in chunks if per_rank % v == 0 and per_rank // v >= 2), default=1)
    s.assumed.append(f"vpp = {vpp}: not stated")
    return vpp


def _usable_chunks(s: Settings, value: int, pp: int, num_microbatches: int, most: int) -> int:
    """Return the stated chunks, 1 where they cannot interleave. Raises ``LayoutError``."""
    if pp * value > max(most, pp):
        rule = f"pp*vpp is at most {most}: the layers, embedding and loss."
        raise LayoutError("vpp", value, rule, f"Use {most // pp} or fewer.")
    group = s.whole(*GROUP_SIZE)
    rest = num_microbatches % (group if group >= pp else pp)
    if pp == 1 or value == 1 or (num_microbatches >= pp and (rest == 0 or rest >= pp)):
        if pp == 1 < value:
            s.assumed.append(f"vpp = 1: {value} is stated, and there is no pipeline")
        return value if pp > 1 else 1
    s.assumed.append(f"vpp = 1: {num_microbatches} micro-batches do not interleave over pp = {pp}")
    return 1


def _stated_chunks(s: Settings, model: Model, pp: int) -> int | None:
    bars = hybrid_stages(s)
    if bars and pp > 1 and len(bars) % pp == 0:
        # Bars in the pattern of a hybrid model part its stages, chunks included.
        return len(bars) // pp
    value = s.number("vpp")
    layers = s.whole("num_layers_per_virtual_pipeline_stage")
    if value is None and layers > 0 and model.num_layers % (pp * layers) == 0:
        return model.num_layers // (pp * layers)
    return value


def hybrid_stages(s: Settings) -> list[int]:
    """Return how many layers the bars of a hybrid pattern give each stage; none without bars."""
    main = s.text("hybrid_layer_pattern").partition("/")[0]
    return [len(stage) for stage in main.split("|")] if "|" in main else []

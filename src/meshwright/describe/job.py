"""What is trained, whatever the layout: sequence, batch, precision, optimizer, task, switches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meshwright.errors import JobError, did_you_mean

CrossEntropy = Literal["vendor", "compiled", "in_place", "plain"]
Task = Literal["pretrain", "sft", "lora"]
TASKS: tuple[Task, ...] = ("pretrain", "sft", "lora")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How numbers are held.

    ``matmul`` names the GPU peak that linear layers run at, ``attention`` that of the scores.
    ``*_bytes`` are bytes per element: weights as held for compute, the extra quantised copies of
    them that FP8 recipes cache, gradients as accumulated and as reduced, the master copy (0: none),
    each Adam moment, activations, matmul inputs kept for backward. ``quantise_moved`` is the number
    of elements read and written per matmul input element to quantise it.
    """

    name: str
    matmul: str
    attention: str = "bf16"
    param_bytes: float = 2.0
    param_copy_bytes: float = 0.0
    grad_bytes: float = 4.0
    grad_reduce_bytes: float = 4.0
    param_gather_bytes: float = 2.0
    master_bytes: float = 4.0
    moment_bytes: float = 8.0
    act_bytes: float = 2.0
    matmul_input_bytes: float = 2.0
    quantise_bytes_per_element: float = 0.0
    head_in_16_bit: bool = True
    """Whether the output layer stays out of FP8 and FP4."""


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision(name="bf16", matmul="bf16"),
        Precision(name="fp16", matmul="fp16", attention="fp16"),
        Precision(
            name="fp32",
            matmul="tf32",
            attention="tf32",
            param_bytes=4.0,
            param_gather_bytes=4.0,
            master_bytes=0.0,
            act_bytes=4.0,
            matmul_input_bytes=4.0,
        ),
        Precision(name="fp8", matmul="fp8", matmul_input_bytes=1.0, quantise_bytes_per_element=3.0),
        Precision(
            name="fp8-cs",
            param_copy_bytes=1.0,
            matmul="fp8",
            matmul_input_bytes=1.0,
            quantise_bytes_per_element=4.0,
        ),
        Precision(
            name="fp8-rowwise",
            param_copy_bytes=1.0,
            matmul="fp8",
            matmul_input_bytes=1.0,
            quantise_bytes_per_element=8.0,
        ),
        Precision(
            name="fp8-mx",
            param_copy_bytes=2.0,
            matmul="fp8",
            matmul_input_bytes=1.0,
            quantise_bytes_per_element=4.0,
        ),
        Precision(
            name="fp8-blockwise",
            param_copy_bytes=2.0,
            matmul="fp8",
            matmul_input_bytes=1.0,
            quantise_bytes_per_element=4.0,
        ),
        Precision(
            name="nvfp4",
            matmul="fp4",
            matmul_input_bytes=0.5625,
            param_copy_bytes=1.125,
            quantise_bytes_per_element=5.0,
        ),
    )
}
"""Recipes by name. FP8: Micikevicius et al., arXiv:2209.05433; MXFP8 and NVFP4: OCP MX 1.0 and
NVIDIA's NVFP4 note (one scale byte per 16 values: 0.5625 bytes an element). Scaling by rows finds
the maxima along both sides of an input, with a pass and a cast for each."""

PRECISION_ALIASES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "fp8-te": "fp8",
    "fp8-delayed": "fp8",
    "fp8-tensorwise": "fp8-cs",
    "fp8-sc": "fp8-blockwise",
    "mxfp8": "fp8-mx",
    "fp4": "nvfp4",
}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Switches of the framework that move time and memory but are not part of the layout.

    The defaults are those of a tuned Megatron-Core run: everything overlapped that can be.
    """

    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    overlap_tp_comm: bool = True
    asynchronous_tp: bool = False
    """Tensor parallelism overlaps as PyTorch's async TP does, not through user buffers."""
    overlap_cp_comm: bool = True
    overlap_ep_comm: bool = False
    overlap_pp_comm: bool = True
    delay_weight_grad: bool = False
    cuda_graphs: Literal["none", "partial", "full"] = "none"
    graphed_modules: frozenset[str] = frozenset()
    """What ``partial`` CUDA graphs hold: attn, mamba, mlp, moe_router, moe_preprocess, moe."""
    dispatcher: Literal["alltoall", "allgather", "deepep", "hybridep"] = "alltoall"
    flash_attention: bool = True
    tuned_attention: bool = True
    """Flash attention of the vendor's library, rather than FlashAttention-2 for every card."""
    fp8_attention: bool = False
    fused_softmax: bool = True
    """Scale, mask and softmax in one kernel, where attention is not flash."""
    softmax_in_fp32: bool = False
    """A softmax that is not fused runs in fp32, and keeps what it returns in fp32 and 16 bit."""
    attention_dropout: bool = True
    """Attention that is not flash keeps a dropout mask and the scores after it."""
    attention_mask: bool = False
    """The data loader makes a mask of every pair of tokens, which causal attention ignores."""
    transformer_engine: bool = True
    """Linear layers are Transformer Engine's, which holds a workspace of its own."""
    deterministic: bool = False
    """cuBLAS has the workspace that ``CUBLAS_WORKSPACE_CONFIG=:4096:8`` gives it on any card."""
    fused_kernels: bool = True
    """Norms, activations, rotary embedding and residual adds as one kernel each."""
    fused_cross_entropy: bool = True
    compiled_cross_entropy: bool = False
    """The fused loss is Megatron's own steps compiled, not Transformer Engine's kernel."""
    in_place_cross_entropy: bool = True
    """The loss that is not fused turns fp32 logits into their gradient in place."""
    megatron_head: bool = True
    """The head is Megatron's own column-parallel layer, which gathers its input into a buffer."""
    deferred_head_microbatches: int = 0
    """Micro-batches whose gradients of the logits wait for the weight gradient of the head."""
    fused_wgrad_accumulation: bool = True
    keeps_placeholders: bool = True
    """Transformer Engine 2.x: empty gradients of fused accumulation stay allocated."""
    caches_quantised_weights: bool = True
    """Weights are quantised in the first micro-batch of a step and kept for the others."""
    grouped_gemm: bool = True
    fused_permute: bool = True
    """Routed tokens are sorted by one kernel, rather than by a chain of them."""
    fused_expert_activation: bool = True
    """The activation of experts and the product with routing probabilities are one kernel."""
    fused_experts: bool = False
    """Transformer Engine's op fuser runs products, biases and activation of experts together."""
    forced_balance: bool = True
    neighbouring_experts: bool = False
    """The experts of a token are the next ones in order, as a router that only counts gives."""
    capacity_factor: float | None = None
    shared_expert_overlap: bool = False
    recompute_every_second_matmul: bool = False
    """torchtitan's selective checkpointing by op: of matmul outputs every second one is kept."""
    blocking_checkpoints: bool = False
    """Each recomputed layer saves and restores random states through the host."""
    scatters_messages: bool = False
    """Tensor-parallel ranks share the sending of what all of them hold to the next stage."""
    packed_sample_tokens: int = 0
    """Mean length of the samples packed into a sequence; 0: one sample fills it."""
    optimizer_offload_fraction: float = 0.0
    activation_offload_layers: int = 0
    offloaded_modules: frozenset[str] = frozenset()
    """Modules whose kept tensors wait on the host, in Megatron's ``--offload-modules`` words."""
    power_boost: bool = False
    """More of the card's power for the cores than for memory (``vboost``)."""
    bucket_bytes: float = 0.0
    """Flat buffers that gradients are reduced and weights gathered in, beside both."""
    gathers_from_master: bool = False
    """Sharded weights are kept in fp32 alone and cast as they are gathered (PyTorch's FSDP)."""
    expandable_segments: bool = False
    """PyTorch's allocator grows its segments (``PYTORCH_CUDA_ALLOC_CONF``)."""

    @property
    def cross_entropy(self) -> CrossEntropy:
        """How the loss is computed: one word for the three switches."""
        if self.fused_cross_entropy:
            return "compiled" if self.compiled_cross_entropy else "vendor"
        return "in_place" if self.in_place_cross_entropy else "plain"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sequence, batch, precision, optimizer and task of a run.

    ``seq_len`` in tokens, ``gbs`` in sequences. ``reserved_bytes`` is memory kept free for others.

    Raises ``JobError`` naming the field when a size is below 1 or a choice is unknown.
    """

    seq_len: int
    gbs: int
    precision: Precision = field(default=PRECISIONS["bf16"])
    task: Task = "pretrain"
    lora_rank: int = 16
    lora_targets: frozenset[str] = frozenset()
    """Names of the adapted ops; empty: every linear layer of attention and MLP."""
    execution: Execution = field(default_factory=Execution)
    reserved_bytes: float = 0.0
    assumed: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("seq_len", "gbs", "lora_rank"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 2**40:
                rule = f"It is a whole number from 1 to {2**40 - 1:,}."
                raise JobError(
                    f"job.{name}",
                    value,
                    rule,
                    "Use fewer." if type(value) is int and value > 1 else "Use 1 or more.",
                )
        if self.task not in TASKS:
            raise JobError("job.task", self.task, "Unknown task.", did_you_mean(self.task, TASKS))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq_len * self.gbs


def precision(name: str) -> Precision:
    """Return a recipe by name. Raises ``JobError`` with the nearest names when unknown."""
    key = name.lower().replace("_", "-")
    key = PRECISION_ALIASES.get(key, key)
    if key not in PRECISIONS:
        known = {*PRECISIONS, *PRECISION_ALIASES}
        raise JobError("job.precision", name, "Unknown precision.", did_you_mean(name, known))
    return PRECISIONS[key]


def job(*, seq_len: int, gbs: int, precision_name: str = "bf16", task: str = "pretrain") -> Job:
    """Make a job from plain words. Raises ``JobError``."""
    if task not in TASKS:
        raise JobError("job.task", task, "Unknown task.", did_you_mean(task, TASKS))
    return Job(seq_len=seq_len, gbs=gbs, precision=precision(precision_name), task=task)

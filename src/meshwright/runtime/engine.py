"""One rank of a training run: groups, chunks, data parallelism, schedule and optimizer together."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from meshwright.describe.job import Execution
from meshwright.parallel.layout import Layout
from meshwright.parallel.placement import Placement
from meshwright.runtime.capacity import token_groups
from meshwright.runtime.collectives import all_gather, all_reduce
from meshwright.runtime.compiled import check_compilable, compile_layers
from meshwright.runtime.context import BUCKET_BYTES, Context, Microbatch
from meshwright.runtime.context_parallel import positions
from meshwright.runtime.data_parallel import DataParallel
from meshwright.runtime.decoder import Chunk, ChunkPlan, Vocabulary
from meshwright.runtime.groups import build_groups
from meshwright.runtime.layers import rope_tables
from meshwright.runtime.legality import check_execution
from meshwright.runtime.optimizer import Optimizer, OptimizerSettings
from meshwright.runtime.parameters import parameters_of
from meshwright.runtime.pipeline_parallel import Pipeline as PipelineRunner
from meshwright.runtime.pipeline_parallel import forward_only
from meshwright.runtime.routing import summed_counts, update_correction_biases
from meshwright.runtime.shape import ModelShape
from meshwright.runtime.stages import placement_of, schedule_of, streams_of, table_ranks
from meshwright.runtime.tensor_parallel import WeightGradients


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells; losses are means over the counted tokens of the global batch."""

    loss: float
    mtp_losses: tuple[float, ...]
    aux_loss: float
    grad_norm: float
    updated: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train: ``seq_len`` in tokens, ``gbs`` in sequences. ``noise`` perturbs the start.

    ``direct`` False makes gloo run its own collectives, the calls that NCCL gets on GPUs.
    ``execution`` says, in the planner's words, which communication runs beside compute; weights
    whose gradients are reduced together hold at least ``bucket_bytes``. ``capacity_layout`` is the
    layout whose ranks' tokens compete for an expert's capacity, by default the run's own.
    ``compile`` names the backend of ``torch.compile`` that layers run through, ``""``: none.
    """

    seq_len: int
    gbs: int
    dtype: torch.dtype = torch.float32
    seed: int = 1234
    noise: float = 0.0
    direct: bool = True
    execution: Execution = field(default_factory=Execution)
    bucket_bytes: int = BUCKET_BYTES
    compile: str = ""
    capacity_layout: Layout[int] | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Engine:
    """One rank of a run. ``step`` trains on a global batch, of which it is given its own rows."""

    def __init__(
        self, shape: ModelShape, x: Layout[int], settings: Settings, *, rank: int = 0
    ) -> None:
        check_execution(shape, settings.execution)
        if settings.compile:
            check_compilable(x, settings.compile)
        self.shape, self.layout, self.settings = shape, x, settings
        placed, self.schedule = placement_of(shape, x), schedule_of(x, settings.gbs)
        groups = build_groups(
            x,
            rank,
            num_kv_heads=shape.num_kv_heads,
            tied_stages=table_ranks(shape, placed),
            direct=settings.direct,
        )
        splits = any(action.kind == "W" for action in self.schedule.ranks[0])
        self.context = Context(
            shape=shape,
            layout=x,
            groups=groups,
            dtype=settings.dtype,
            execution=settings.execution,
            bucket_bytes=settings.bucket_bytes,
            later=WeightGradients() if splits else None,
            token_groups=token_groups(
                x,
                settings.capacity_layout or x,
                settings.seq_len,
                cp=groups.cp.index,
                tp=groups.tp.index,
            )
            if shape.moe and shape.moe.capacity_factor
            else None,
        )
        self.chunks = self._build_chunks(placed)
        self.dp = DataParallel(self.context, self.chunks)
        self.dp.materialise(settings.device, settings.seed, settings.noise)
        if settings.compile:
            compile_layers(self.chunks, settings.compile)
        self.optimizer = Optimizer(self.dp, settings.optimizer)
        self.streams = streams_of(placed)
        self.pipeline = PipelineRunner(
            self.context, self.chunks, self.schedule, self.dp, self.streams
        )
        self.positions = positions(settings.seq_len, groups.cp_inner, groups.cp_outer).to(
            settings.device
        )
        self.rope = rope_tables(shape.rope, shape.rotary_dim, self.positions)
        self.window_rope = self.rope
        if shape.window_rope is not None:
            self.window_rope = rope_tables(shape.window_rope, shape.rotary_dim, self.positions)

    def _build_chunks(self, placed: Placement) -> list[Chunk]:
        context, pp = self.context, self.context.groups.pp
        chunks: list[Chunk] = []
        table: Vocabulary | None = None
        for number in range(self.layout.vpp):
            stage = self.schedule.stage(pp.index, number)
            plan = ChunkPlan(
                stage=stage,
                layers=placed.layers[stage],
                embedding=stage == placed.embedding_stage,
                loss=stage == placed.loss_stage,
                mtp_layers=placed.mtp_layers[stage],
            )
            chunk = Chunk(context, plan, table)
            table = getattr(chunk, "embed_tokens", table)
            chunks.append(chunk)
        if self.shape.lora_rank:
            for member in (p for chunk in chunks for p in parameters_of(chunk)):
                member.requires_grad_(member.box.adapter)
        return chunks

    @property
    def num_microbatches(self) -> int:
        """Microbatches that one pipeline works through per step."""
        return self.schedule.num_microbatches

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's sequences of a global batch ``[gbs, ...]``.

        Microbatch j of all DP ranks together is a run of dp*mbs sequences, as in Megatron-LM.
        """
        x = self.layout
        shape = (self.num_microbatches, x.dp, x.mbs)
        return batch.unflatten(0, shape)[:, self.context.groups.dp.index].flatten(0, 1)

    def step(self, rows: Tensor, mask: Tensor | None = None, lr: float | None = None) -> StepResult:
        """Train on one global batch.

        ``rows`` are this rank's sequences ``[m * mbs, seq_len + 1]`` of tokens, ``mask``
        ``[m * mbs, seq_len]`` is 0 where a token's loss does not count.
        """
        losses, result = self.forward_backward(rows, mask)
        lr = self.settings.optimizer.lr if lr is None else lr
        norm, updated = self.update(lr)
        return StepResult(
            loss=losses[0],
            mtp_losses=tuple(losses[1:]),
            aux_loss=result,
            grad_norm=norm,
            updated=updated,
        )

    def update(self, lr: float) -> tuple[float, bool]:
        """Update the weights and the routers' biases by what ``forward_backward`` found.

        Returns the gradient norm and whether it was finite; if not, nothing changes.
        """
        norm, updated = self.optimizer.step(lr)
        moe = self.shape.moe
        if updated and moe is not None and moe.bias_update_rate:
            rate = moe.bias_update_rate
            update_correction_biases(self.dp.buffers, self.expert_tokens(), rate)
        return norm, updated

    def expert_tokens(self) -> dict[str, Tensor]:
        """Return how many tokens of the last global batch chose each expert, ``[E]`` per router.

        Of all routers, by name; every rank has to ask.
        """
        counts = self.pipeline.expert_counts
        return summed_counts(counts, self.context, self.settings.device)

    def forward_backward(
        self, rows: Tensor, mask: Tensor | None = None
    ) -> tuple[list[float], float]:
        """Compute the gradient of a global batch; return its losses (main, MTP) and router loss."""
        self.dp.start_step()
        mask = torch.ones_like(rows[:, 1:]) if mask is None else mask
        counts = self._counts(mask)
        found, aux = self.pipeline.run(self._microbatches(rows, mask, counts), self._empty)
        self.dp.finish()
        return self._means(found, aux, counts)

    @torch.no_grad()
    def evaluate(self, rows: Tensor, mask: Tensor | None = None) -> list[float]:
        """Return the losses (main, MTP) of a global batch, given as to ``step``; no gradient."""
        mask = torch.ones_like(rows[:, 1:]) if mask is None else mask
        counts = self._counts(mask)
        schedule = forward_only(self.schedule)
        runner = PipelineRunner(self.context, self.chunks, schedule, self.dp, self.streams)
        found, aux = runner.run(self._microbatches(rows, mask, counts), self._empty)
        return self._means(found, aux, counts)[0]

    def _means(
        self, found: list[Tensor], aux: list[Tensor], counts: list[float]
    ) -> tuple[list[float], float]:
        """Return the mean losses over all ranks' microbatches, and the sum of router losses."""
        groups = self.context.groups
        device = self.settings.device
        totals = torch.zeros(1 + len(counts), dtype=torch.float64, device=device)
        if groups.tp.index == 0 and found:
            totals[:-1] = torch.stack(found).double().sum(0)
        if aux:
            totals[-1] = torch.stack(aux).double().sum()
        totals = all_reduce(totals, groups.world).tolist()
        return [t / n for t, n in zip(totals[:-1], counts, strict=True)], totals[-1]

    def _counts(self, mask: Tensor) -> list[float]:
        """Return the counted tokens of the global batch, for the loss and each MTP depth."""
        own = torch.stack(
            [mask[:, depth:].double().sum() for depth in range(1 + self.shape.mtp_layers)]
        )
        return all_reduce(own, self.context.groups.dp).clamp(min=1.0).tolist()

    def _microbatches(self, rows: Tensor, mask: Tensor, counts: list[float]) -> list[Microbatch]:
        aux_scale = 1.0 / (self.num_microbatches * self.layout.dp)
        return [
            self._microbatch(part, part_mask, counts, aux_scale)
            for part, part_mask in zip(
                rows.split(self.layout.mbs), mask.split(self.layout.mbs), strict=True
            )
        ]

    def _microbatch(
        self, rows: Tensor, mask: Tensor, counts: list[float], aux_scale: float
    ) -> Microbatch:
        def here(x: Tensor) -> Tensor:
            return x.T[self.positions].contiguous()

        def shifted(x: Tensor, by: int) -> Tensor:
            return torch.nn.functional.pad(x[:, by:], (0, by))

        tokens, labels = rows[:, :-1], rows[:, 1:]
        mtp = tuple(
            (
                here(shifted(tokens, by)),
                here(shifted(labels, by)),
                here(shifted(mask, by)),
            )
            for by in range(1, 1 + self.shape.mtp_layers)
        )
        return Microbatch(
            tokens=here(tokens),
            labels=here(labels),
            mask=here(mask),
            rope=self.rope,
            window_rope=self.window_rope,
            mtp=mtp,
            loss_scale=1.0 / counts[0],
            mtp_scales=tuple(1.0 / count for count in counts[1:]),
            aux_scale=aux_scale,
        )

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Return the logits ``[b, s, V]`` of sequences ``[b, s]``, on the ranks of the last stage.

        A forward pass of the whole batch as one microbatch; ``s`` is ``seq_len``.
        """
        mask = torch.ones_like(tokens)
        rows = torch.nn.functional.pad(tokens, (0, 1))
        counts = [1.0] * (1 + self.shape.mtp_layers)
        batch = self._microbatch(rows, mask, counts, aux_scale=0.0)
        found = self.pipeline.logits(batch, lambda: self._empty(len(tokens)))
        if found is None:
            return None
        groups = self.context.groups
        # [s, b, V/TP] -> [V, b, s] over TP, then [s, b, V] over CP in the order of positions.
        words = all_gather(found.transpose(0, 2).contiguous(), groups.tp)
        gathered = all_gather(words.transpose(0, 2).contiguous(), groups.cp)
        order = all_gather(self.positions, groups.cp).argsort()
        return gathered[order].transpose(0, 1)[..., : self.shape.vocab_size]

    def _empty(self, sequences: int = 0) -> Tensor:
        x = self.layout
        tokens = self.settings.seq_len // x.cp // (x.tp if self.context.sp else 1)
        return torch.empty(
            (tokens, sequences or x.mbs, self.shape.hidden_size),
            dtype=self.settings.dtype,
            device=self.settings.device,
        )

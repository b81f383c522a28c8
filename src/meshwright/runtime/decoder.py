"""A decoder cut into pipeline chunks: embedding, layers, head, multi-token prediction.

Parameter names are global (``model.layers.17.mlp.up_proj.weight``), whatever the chunk.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from meshwright.parallel.layout import Recompute
from meshwright.runtime.attention_layers import Attention, LatentAttention
from meshwright.runtime.context import Context, Microbatch, recompute
from meshwright.runtime.expert_parallel import Moe
from meshwright.runtime.layers import Linear, Mlp, RmsNorm
from meshwright.runtime.parameters import Box, parameter
from meshwright.runtime.tensor_parallel import (
    enter_linear,
    leave,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward branches on a residual stream.

    Norms stand before each branch, after it, or both (``sandwich``).
    """

    def __init__(self, context: Context, name: str, number: int) -> None:
        super().__init__()
        shape = context.shape
        self.context = context
        self.turns = number not in shape.unrotated_layers
        self.windowed = number in shape.window_layers

        def norm(part: str, wanted: bool) -> RmsNorm | None:
            return RmsNorm(context, f"{name}.{part}", shape.hidden_size) if wanted else None

        before, after = shape.norms != "post", shape.norms != "pre"
        self.input_layernorm = norm("input_layernorm", before)
        self.post_attention_layernorm = norm("post_attention_layernorm", wanted=True)
        self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", before and after)
        self.post_feedforward_layernorm = norm("post_feedforward_layernorm", after)
        window = shape.window if self.windowed else 0
        self.self_attn = (
            LatentAttention(context, f"{name}.self_attn")
            if shape.mla
            else Attention(context, f"{name}.self_attn", window=window)
        )
        has_experts = shape.moe is not None and number in shape.moe_layers
        self.mlp = (
            Moe(context, f"{name}.mlp", shape.moe)
            if has_experts and shape.moe
            else Mlp(context, f"{name}.mlp", shape.ffn_hidden_size)
        )

    def forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        """Return the residual stream after the layer."""
        normed, scale = self._normed, self.context.shape.residual_scale
        after = self.context.shape.norms != "pre"
        branch = self.self_attn(normed(self.input_layernorm, x), self._rope(batch))
        if after and self.post_attention_layernorm is not None:
            branch = self.post_attention_layernorm(branch)
        x = x + (branch if scale == 1.0 else scale * branch)
        before = self.pre_feedforward_layernorm if after else self.post_attention_layernorm
        branch = self._feed_forward(normed(before, x), batch)
        if self.post_feedforward_layernorm is not None:
            branch = self.post_feedforward_layernorm(branch)
        return x + (branch if scale == 1.0 else scale * branch)

    def _normed(self, norm: RmsNorm | None, x: Tensor) -> Tensor:
        return x if norm is None else self.context.recomputed(Recompute.layernorm, norm, x)

    def _rope(self, batch: Microbatch) -> tuple[Tensor, Tensor] | None:
        if not self.turns:
            return None
        return batch.window_rope if self.windowed else batch.rope

    def _feed_forward(self, x: Tensor, batch: Microbatch) -> Tensor:
        if isinstance(self.mlp, Moe):
            return self.mlp(x, batch.aux_scale)
        return self.mlp(x)


class Vocabulary(nn.Module):
    """A table ``[V, h]`` of which each TP rank holds ceil(V / TP) rows, the last ones padding."""

    def __init__(self, context: Context, name: str, *, tied: bool, counted: bool = True) -> None:
        super().__init__()
        shape, tp = context.shape, context.groups.tp
        self.context = context
        rows = -(-shape.vocab_size // tp.size)
        self.first_row = tp.index * rows
        self.num_rows = max(0, min(rows, shape.vocab_size - self.first_row))
        box = Box(
            name=f"{name}.weight",
            shape=(shape.vocab_size, shape.hidden_size),
            offsets=(self.first_row, 0),
            std=shape.initializer_range,
            tied=tied,
            reused=shape.tie_word_embeddings or shape.mtp_layers > 0,
            counted=counted,
        )
        self.weight = parameter(box, (rows, shape.hidden_size), context.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the rows of ``[s, b]`` tokens, ``[s, b, h]`` (of this rank's tokens with SP)."""
        found = vocab_parallel_embedding(tokens, self.weight, self.first_row)
        scale = self.context.shape.embedding_scale
        if scale != 1.0:
            # In the dtype of the run, as the published weights were trained.
            found = found * torch.tensor(scale, dtype=found.dtype, device=found.device)
        return leave(found, self.context.groups.tp, sp=self.context.sp)

    def loss_sum(self, x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Return the sum of the counted tokens' cross-entropy, with this table as the head."""
        tp = self.context.groups.tp
        logits = self.logits(x)
        losses = vocab_parallel_cross_entropy(logits, labels, self.first_row, self.num_rows, tp)
        return (losses * mask.to(losses.dtype)).sum()

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the words whose rows are here, for all tokens of the TP group."""
        shape = self.context.shape
        logits = enter_linear(x, self.context.region, [self.weight], [None])[0]
        if shape.logit_scale != 1.0:
            logits = logits * shape.logit_scale
        if shape.logit_softcap:
            logits = shape.logit_softcap * (logits / shape.logit_softcap).tanh()
        return logits


class MtpLayer(nn.Module):
    """One depth of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

    def __init__(self, context: Context, number: int) -> None:
        super().__init__()
        name, h = f"model.layers.{number}", context.shape.hidden_size
        self.enorm = RmsNorm(context, f"{name}.enorm", h)
        self.hnorm = RmsNorm(context, f"{name}.hnorm", h)
        self.eh_proj = Linear(context, f"{name}.eh_proj", 2 * h, h)
        self.layer = Layer(context, name, number)
        self.norm = RmsNorm(context, f"{name}.shared_head.norm", h)

    def forward(self, x: Tensor, embedded: Tensor, batch: Microbatch) -> Tensor:
        """Return the hidden state that predicts one token further."""
        joined = torch.cat([self.enorm(embedded), self.hnorm(x)], dim=-1)
        return self.layer(self.eh_proj(joined), batch)


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """What one model chunk of a pipeline rank holds."""

    stage: int
    layers: tuple[int, ...]
    embedding: bool
    loss: bool
    mtp_layers: int


Unit = Callable[[nn.Module, Callable[..., Tensor]], Callable[..., Tensor]]
"""How a module of the chunk is called: data parallelism gathers its parameters around the call."""


def call_directly(module: nn.Module, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Call a module's function with nothing around it."""
    return function


class Chunk(nn.Module):
    """One model chunk. ``forward`` maps hidden states to hidden states, or to the objective.

    Prediction depths that are computed before the stage of the loss travel to it, normalised,
    behind the hidden states: ``[(1 + depths) s, b, h]`` (as in Megatron-LM).
    ``losses`` then holds the summed cross-entropy and that of every prediction depth. A rank with
    both ends of the model (V-shaped schedules, no pipeline) has one table for both when tied.
    """

    def __init__(self, context: Context, plan: ChunkPlan, table: Vocabulary | None) -> None:
        super().__init__()
        shape = context.shape
        self.context, self.plan = context, plan
        self.unit: Unit = call_directly
        self.losses: list[Tensor] = []
        needs_table = plan.embedding or plan.mtp_layers or (plan.loss and shape.tie_word_embeddings)
        if needs_table:
            self.embed_tokens = table or embedding_table(context, counted=plan.embedding)
        self.layers = nn.ModuleDict(
            {str(n): Layer(context, f"model.layers.{n}", n) for n in plan.layers}
        )
        self.mtp = nn.ModuleList(
            MtpLayer(context, shape.num_layers + depth) for depth in range(plan.mtp_layers)
        )
        if plan.loss:
            self.norm = RmsNorm(context, "model.norm", shape.hidden_size)
            if not shape.tie_word_embeddings:
                self.lm_head = Vocabulary(context, "lm_head", tied=False)

    @property
    def head(self) -> Vocabulary:
        """The table that makes logits."""
        return self.embed_tokens if self.context.shape.tie_word_embeddings else self.lm_head

    def forward(self, x: Tensor | None, batch: Microbatch) -> Tensor:
        """Return hidden states ``[s, b, h]``, or the objective where the loss sits."""
        x = self.hidden(x, batch)
        if not self.plan.loss:
            return torch.cat([x, *self._ahead(x, batch)]) if self.mtp else x
        if self.mtp:
            return self._objective(x, self._ahead(x, batch), batch)
        x, *ahead = x.chunk(1 + self.context.shape.mtp_layers)
        return self._objective(x, ahead, batch)

    def hidden(self, x: Tensor | None, batch: Microbatch) -> Tensor:
        """Return the hidden states after the last layer of the chunk."""
        if self.plan.embedding:
            x = self.unit(self.embed_tokens, self.embed_tokens.embed)(batch.tokens)
        assert x is not None
        return self._run_layers(x, batch)

    def hidden_to_logits(self, x: Tensor) -> Tensor:
        """Return the logits of this rank's words after the final norm."""
        x = self.unit(self.norm, self.norm)(x)
        return self.unit(self.head, self.head.logits)(x)

    def _ahead(self, x: Tensor, batch: Microbatch) -> Iterator[Tensor]:
        """Yield, depth by depth, the normalised hidden states that predict further tokens."""
        for depth, layer in enumerate(self.mtp):
            assert isinstance(layer, MtpLayer)
            embedded = self.unit(self.embed_tokens, self.embed_tokens.embed)(batch.mtp[depth][0])
            x = self.unit(layer, layer)(x, embedded, batch)
            yield self.unit(layer.norm, layer.norm)(x)

    def _objective(self, x: Tensor, ahead: Iterable[Tensor], batch: Microbatch) -> Tensor:
        normed = self.unit(self.norm, self.norm)(x)
        loss_sum = self.unit(self.head, self.head.loss_sum)
        total = loss_sum(normed, batch.labels, batch.mask)
        self.losses = [total.detach()]
        objective = total * batch.loss_scale
        shape = self.context.shape
        coefficient = shape.mtp_loss_coef / max(1, shape.mtp_layers)
        for depth, hidden in enumerate(ahead):
            _, labels, mask = batch.mtp[depth]
            extra = loss_sum(hidden, labels, mask)
            self.losses.append(extra.detach())
            objective = objective + extra * (coefficient * batch.mtp_scales[depth])
        return objective

    def _run_layers(self, x: Tensor, batch: Microbatch) -> Tensor:
        layout = self.context.layout
        layers = list(self.layers.values())
        if not (layout.recompute & Recompute.full and torch.is_grad_enabled()):
            return self._run(layers, x, batch)
        if layout.recompute & Recompute.block:
            count = layout.recompute_num_layers
            for layer in layers[:count]:
                x = recompute(self._run, [layer], x, batch)
            return self._run(layers[count:], x, batch)
        step = layout.recompute_num_layers or 1
        for start in range(0, len(layers), step):
            x = recompute(self._run, layers[start : start + step], x, batch)
        return x

    def _run(self, layers: list[nn.Module], x: Tensor, batch: Microbatch) -> Tensor:
        for layer in layers:
            x = self.unit(layer, layer)(x, batch)
        return x


def embedding_table(context: Context, *, counted: bool) -> Vocabulary:
    """Make the token embedding; ``counted`` on the pipeline rank whose copy counts in norms."""
    tied = context.groups.tied.size > 1
    return Vocabulary(context, "model.embed_tokens", tied=tied, counted=counted)

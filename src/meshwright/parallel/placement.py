"""Which layers sit on which pipeline rank and chunk.

A pipeline of ``pp`` ranks with ``vpp`` chunks each has S = pp*vpp virtual stages. Stage s of the
model, in model order, sits on rank s mod pp in chunk s // pp; in the V shape of zero-bubble
schedules the second chunk runs backwards, so that rank 0 holds the first and the last stage.
The rules are Megatron-LM's (``transformer_block.get_num_layers_to_build`` and
``pipeline_parallel_layer_layout``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Protocol

from meshwright.errors import LayoutError, nearest_divisors
from meshwright.parallel.layout import Pipeline, whole_number, written
from meshwright.parallel.pipeline_layout import MOST_LAYERS, read_pipeline_layout


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What each virtual stage holds, stages in model order; tuples of length S = pp*vpp.

    ``layers[s]`` are the numbers of its decoder layers, ``mtp_layers[s]`` how many multi-token
    prediction layers it holds; ``rank_of_stage[s]`` and ``chunk_of_stage[s]`` say where it sits.
    """

    layers: tuple[tuple[int, ...], ...]
    mtp_layers: tuple[int, ...]
    embedding_stage: int
    loss_stage: int
    rank_of_stage: tuple[int, ...]
    chunk_of_stage: tuple[int, ...]


class PipelineChoices(Protocol):
    """What of a layout decides where layers sit."""

    @property
    def schedule(self) -> int:
        """A ``Pipeline``."""
        ...

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        ...

    @property
    def vpp(self) -> int:
        """Chunks of a rank."""
        ...

    @property
    def first(self) -> int:
        """Layers of the first rank; 0: as the others."""
        ...

    @property
    def last(self) -> int:
        """Layers of the last rank; 0: as the others."""
        ...

    @property
    def account_for_embedding(self) -> int:
        """Whether the embedding counts as a layer."""
        ...

    @property
    def account_for_loss(self) -> int:
        """Whether the loss counts as a layer."""
        ...

    @property
    def pipeline_layout(self) -> str | None:
        """Every stage, spelled."""
        ...


def place_by(x: PipelineChoices, num_layers: int, mtp: int) -> Placement:
    """Return what each virtual stage of a layout holds. Raises ``LayoutError`` as ``place``."""
    return place(
        num_layers,
        x.pp,
        x.vpp,
        first=x.first,
        last=x.last,
        account_for_embedding=bool(x.account_for_embedding),
        account_for_loss=bool(x.account_for_loss),
        pipeline_layout=x.pipeline_layout,
        mtp=mtp,
        schedule=Pipeline(x.schedule),
    )


def stage_ranks(pp: int, vpp: int, v_shape: bool = False) -> tuple[int, ...]:
    """Return the pipeline rank of every virtual stage, in model order."""
    up = tuple(range(pp))
    if v_shape:
        return tuple(r for chunk in range(vpp) for r in (up[::-1] if chunk % 2 else up))
    return up * vpp


def place_layers(
    num_layers: int,
    pp: int,
    vpp: int | None = 1,
    first: int | None = None,
    last: int | None = None,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    layout: str | None = None,
    mtp: int = 0,
    layers_per_vpp: int | None = None,
) -> list[list[dict[str, Any]]]:
    """Return, for every pipeline rank and chunk, the layers that Megatron-LM places there.

    Each chunk is ``{"layers": [int], "mtp_layers": int, "embedding": bool, "loss": bool}``.
    ``layout`` and ``layers_per_vpp`` give the number of chunks themselves.

    Raises ``LayoutError`` where Megatron-LM refuses the placement.
    """
    num_layers = whole_number("num_layers", num_layers)
    pp, vpp = whole_number("layout.pp", pp), 1 if vpp is None else vpp
    if layout is not None:
        written("layout.pipeline_layout", layout)
    for name, value in (("first", first), ("last", last)):
        if value is not None:
            whole_number(f"layout.{name}", value)
    if layers_per_vpp is not None:
        counted = num_layers + bool(account_for_embedding) + bool(account_for_loss)
        vpp = _chunks_of(counted, pp, vpp, layers_per_vpp, (first, last, layout))
    elif layout is not None and vpp == 1:
        vpp = max(1, len(read_pipeline_layout(layout)) // pp)
    placed = place(
        num_layers,
        pp,
        vpp,
        first=first or 0,
        last=last or 0,
        account_for_embedding=account_for_embedding,
        account_for_loss=account_for_loss,
        pipeline_layout=layout,
        mtp=mtp,
    )
    return [
        [
            {
                "layers": list(placed.layers[stage]),
                "mtp_layers": placed.mtp_layers[stage],
                "embedding": stage == placed.embedding_stage,
                "loss": stage == placed.loss_stage,
            }
            for stage in range(rank, pp * vpp, pp)
        ]
        for rank in range(pp)
    ]


def _chunks_of(
    counted: int, pp: int, vpp: int, layers_per_vpp: int, others: tuple[object, ...]
) -> int:
    field = "layers_per_vpp"
    whole_number(field, layers_per_vpp)
    if vpp != 1 or any(other is not None for other in others):
        rule = "It says how layers are split, and so do vpp, first, last and layout."
        raise LayoutError(field, layers_per_vpp, rule, "Give one of them.")
    if counted % pp:
        return 1  # place() tells what is wrong with pp
    per_rank = counted // pp
    if per_rank % layers_per_vpp:
        near = " or ".join(map(str, nearest_divisors(per_rank, layers_per_vpp)))
        rule = f"It must divide the {per_rank} layers of a pipeline rank."
        raise LayoutError(field, layers_per_vpp, rule, f"Use {near}.")
    return per_rank // layers_per_vpp


@lru_cache(maxsize=4096)
def place(
    num_layers: int,
    pp: int,
    vpp: int,
    *,
    first: int = 0,
    last: int = 0,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    pipeline_layout: str | None = None,
    mtp: int = 0,
    schedule: Pipeline = Pipeline.one_f_one_b,
) -> Placement:
    """Return what each virtual stage holds.

    Without hints every stage holds L/S layers. ``first``/``last`` fix the layers of the first and
    last rank (0: as the others); ``account_for_embedding``/``account_for_loss`` count embedding
    and loss as one layer each; ``pipeline_layout`` spells every stage ("Et*3|(tt|)*4,m|L").
    ``schedule`` matters for ``zb_v`` alone, whose stages lie in a V.

    Raises ``LayoutError``, with the nearest legal values, when the layers cannot be split so.
    """
    num_layers = whole_number("num_layers", num_layers, high=MOST_LAYERS)
    pp, vpp = whole_number("layout.pp", pp), whole_number("layout.vpp", vpp)
    mtp = whole_number("mtp", mtp, low=0)
    uneven = bool(first or last)
    accounted = account_for_embedding or account_for_loss
    v_shape = schedule == Pipeline.zb_v
    _check_shape(pp, vpp, v_shape, uneven)
    mtp_layers: tuple[int, ...] | None = None
    if pipeline_layout is not None:
        if uneven or accounted:
            raise LayoutError(
                "layout.pipeline_layout",
                pipeline_layout,
                "It already says where every layer, the embedding and the loss sit.",
                "Leave out first, last, account_for_embedding and account_for_loss.",
            )
        segments = read_pipeline_layout(pipeline_layout)
        _check_segments(pipeline_layout, segments, num_layers, pp, vpp, mtp)
        counts = [segment.count("t") for segment in segments]
        mtp_layers = tuple(segment.count("m") for segment in segments)
    elif uneven:
        if accounted:
            rule = "first/last and account_for_embedding/account_for_loss exclude each other."
            raise LayoutError("layout.first", first, rule, "Use one of the two ways.")
        counts = _uneven(num_layers, pp, vpp, first, last)
    else:
        counts = _even(num_layers, pp, vpp, account_for_embedding, account_for_loss)
    stages = pp * vpp
    starts = accumulate(counts, initial=0)
    return Placement(
        layers=tuple(tuple(range(a, b)) for a, b in pairwise(starts)),
        mtp_layers=mtp_layers or (*(0,) * (stages - 1), mtp),
        embedding_stage=0,
        loss_stage=stages - 1,
        rank_of_stage=stage_ranks(pp, vpp, v_shape),
        chunk_of_stage=tuple(stage // pp for stage in range(stages)),
    )


def _check_shape(pp: int, vpp: int, v_shape: bool, uneven: bool) -> None:
    if v_shape and vpp != 2:
        raise LayoutError("layout.vpp", vpp, "The V shape has two chunks a rank.", "Use vpp=2.")
    if v_shape and uneven:
        rule = "In the V shape the first rank is also the last."
        raise LayoutError("layout.first", uneven, rule, "Use pipeline_layout instead.")
    if vpp > 1 and pp == 1 and not v_shape:
        rule = "Interleaving needs pipeline parallelism (pp > 1)."
        raise LayoutError("layout.vpp", vpp, rule, "Use vpp=1, or pp=2.")


def _even(num_layers: int, pp: int, vpp: int, embedding: bool, loss: bool) -> list[int]:
    """Return L/S layers a stage, the embedding and the loss taking the place of one if counted."""
    counted = num_layers + bool(embedding) + bool(loss)
    what = f"num_layers = {num_layers}"
    if counted != num_layers:
        what += f" + {counted - num_layers} (embedding or loss counted as a layer) = {counted}"
    if counted % pp:
        raise LayoutError(
            "layout.pp",
            pp,
            f"It must divide {what}.",
            _or_layout(f"pp={_joined(nearest_divisors(counted, pp))}", num_layers, pp * vpp),
        )
    if counted // pp % vpp:
        near = _joined(nearest_divisors(counted // pp, vpp))
        raise LayoutError(
            "layout.vpp",
            vpp,
            f"It must divide the layers of a pipeline rank, {what} over {pp} = {counted // pp}.",
            _or_layout(f"vpp={near}", num_layers, pp * vpp),
        )
    counts = [counted // (pp * vpp)] * (pp * vpp)
    counts[0] -= bool(embedding)
    counts[-1] -= bool(loss)
    return counts


def _joined(values: list[int]) -> str:
    return " or ".join(map(str, values))


def _or_layout(remedy: str, num_layers: int, stages: int) -> str:
    if stages > num_layers:
        return f"Use {remedy}."
    return f"Use {remedy}, or pipeline_layout={balanced_layout(num_layers, stages)}"


def balanced_layout(num_layers: int, num_stages: int, mtp: int = 0) -> str:
    """Return a pipeline layout whose stages differ by at most one layer, ends lighter.

    Raises ``LayoutError`` when a stage would be empty.
    """
    if num_stages > num_layers:
        rule = f"There are fewer layers than {num_stages} stages."
        raise LayoutError("num_layers", num_layers, rule, f"Use at most {num_layers} stages.")
    base, extra = divmod(num_layers, num_stages)
    # The embedding and the loss weigh on the ends, so the larger stages stand in the middle.
    lead = (num_stages - extra + 1) // 2
    counts = [base] * lead + [base + 1] * extra + [base] * (num_stages - extra - lead)
    return "E" + "|".join(f"t*{count}" for count in counts) + "m" * mtp + "L"


def _uneven(num_layers: int, pp: int, vpp: int, first: int, last: int) -> list[int]:
    """Return the counts when the first and/or last rank has its own number of layers."""
    given = bool(first) + bool(last)
    middle_layers, middle_ranks = num_layers - first - last, pp - given
    name, value = ("first", first) if first else ("last", last)
    if middle_ranks < 0 or middle_layers < 0 or (middle_layers == 0) != (middle_ranks == 0):
        raise LayoutError(
            f"layout.{name}",
            value,
            f"It leaves {middle_layers} layers of {num_layers} for {middle_ranks} other ranks.",
            "Choose first and last so that every rank gets layers, or use pipeline_layout.",
        )
    if vpp > 1 and middle_ranks == 0 and given == 2:
        rule = "Megatron-LM cannot interleave two ranks with both first and last given."
        raise LayoutError("layout.vpp", vpp, rule, "Use vpp=1, or pipeline_layout.")
    if middle_ranks and middle_layers % middle_ranks:
        raise LayoutError(
            f"layout.{name}",
            value,
            f"The remaining {middle_layers} layers must split over {middle_ranks} ranks.",
            f"Use {name}={value + middle_layers % middle_ranks}, or pipeline_layout.",
        )
    middle = middle_layers // middle_ranks if middle_ranks else 0
    of_rank = [first or middle, *(middle,) * (pp - 2), last or middle] if pp > 1 else [num_layers]
    for rank, count in enumerate(of_rank):
        if count % vpp:
            field = "first" if rank == 0 and first else "last" if rank == pp - 1 and last else "vpp"
            raise LayoutError(
                f"layout.{field}",
                vpp if field == "vpp" else count,
                f"The {count} layers of pipeline rank {rank} must split over vpp = {vpp} chunks.",
                "Choose first, last and vpp so that they do, or use pipeline_layout.",
            )
    return [count // vpp for count in of_rank] * vpp


def _check_segments(
    text: str, segments: tuple[str, ...], num_layers: int, pp: int, vpp: int, mtp: int
) -> None:
    letters = "".join(segments)
    with_mtp = [stage for stage, segment in enumerate(segments) if "m" in segment]
    wrong: list[tuple[bool, str, str]] = [
        (
            len(segments) != pp * vpp,
            f"It has {len(segments)} stages, and pp*vpp = {pp}*{vpp} = {pp * vpp}.",
            f"Use vpp={len(segments) // pp}."
            if len(segments) % pp == 0
            else f"Write {pp * vpp} stages.",
        ),
        (not letters.startswith("E"), "The first stage starts with E.", "Start with E."),
        (not letters.endswith("L"), "The last stage ends with L.", "End with L."),
        (letters.count("E") != 1, "There is one embedding.", "Write E once, first."),
        (letters.count("L") != 1, "There is one loss.", "Write L once, last."),
        (
            letters.count("t") != num_layers,
            f"It has {letters.count('t')} layers, the model {num_layers}.",
            f"Write t {num_layers} times.",
        ),
        (
            letters.count("m") != mtp,
            f"It has {letters.count('m')} MTP layers, the model {mtp}.",
            f"Write m {mtp} times, after all t.",
        ),
        ("t" in letters.partition("m")[2], "MTP layers follow all others.", "Write m after t."),
        (len(with_mtp) > 1, "MTP layers sit in one stage.", "Write all m in one stage."),
        (
            any(stage < pp * (vpp - 1) for stage in with_mtp),
            "MTP layers sit in the last chunk of their rank.",
            f"Write m in one of the last {pp} stages.",
        ),
    ]
    for is_wrong, rule, remedy in wrong:
        if is_wrong:
            raise LayoutError("layout.pipeline_layout", text, rule, remedy)

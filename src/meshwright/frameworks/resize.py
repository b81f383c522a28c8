"""A working launch on another number of GPUs: the batch stays what it is, the layout follows."""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.errors import LaunchError, MeshwrightError
from meshwright.frameworks.check import CheckResult, check
from meshwright.frameworks.convert import Known, carried_to, known_of
from meshwright.frameworks.in_place import edit
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.nearest import nearest_legal
from meshwright.frameworks.quantities import Wanted
from meshwright.frameworks.read import read_document, read_text
from meshwright.frameworks.saved import PLAN
from meshwright.frameworks.shell_words import MAX_BYTES
from meshwright.frameworks.write import launch_files, unsupported
from meshwright.parallel.layout import CpComm, Layout, to_dict


@dataclass(frozen=True, kw_only=True)
class Resized:
    """A launch on another number of GPUs: what changed, what did not, and its files.

    ``in_place``: the files are those that were read, with numbers changed; ``diff`` shows them.
    Else they were written anew, and ``by_hand`` says what in the launch could not be edited and
    which value belongs there.
    """

    read: CheckResult
    before: Layout[int]
    layout: Layout[int]
    job: Job
    changes: dict[str, tuple[object, object]]
    kept: list[str]
    notes: list[str]
    files: dict[str, str]
    in_place: bool
    diff: str
    by_hand: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the command line."""
        return {
            "framework": self.read.launch.framework,
            "gpus": self.layout.world_size,
            "layout": to_dict(self.layout),
            "before": to_dict(self.before),
            "changes": {k: list(v) for k, v in self.changes.items()},
            "kept": self.kept,
            "notes": self.notes,
            "files": self.files,
            "in_place": self.in_place,
            "diff": self.diff,
            "by_hand": self.by_hand,
        }


def resize(
    source: str | Path | Sequence[str],
    gpus: int,
    *,
    framework: str | None = None,
    model: str | None = None,
    launcher: str = "torchrun",
    fresh: bool = False,
) -> Resized:
    """Move a launch to ``gpus`` GPUs with its batch kept.

    Sequences a step, sequence length and precision stay, and with them learning rate and tokens.
    Where the degrees cannot stay, the nearest legal ones are taken.

    The launch's own file is edited: numbers change where they stand, everything else stays as it
    is. Where that is not possible, or when ``fresh``, a script for ``launcher`` is written anew; it
    keeps what the launch says besides (data, tokenizer, optimizer, logging, flags of its own).

    Raises ``LayoutError`` when no legal layout of the job exists on that many GPUs, and
    ``LaunchError`` for SkyRL's RL trainer where it has to be written anew.
    """
    read = check(source, framework=framework)
    if read.launch.framework == PLAN:
        rule = "This is a plan, which is for its own number of GPUs."
        raise LaunchError("file", str(source), rule, "Plan anew with meshwright plan.")
    known = known_of(read, model)
    layout = nearest_legal(known.model, known.job, known.layout, gpus, _can_run(read, known))
    made = _Made() if fresh else _in_place(source, read, known, layout)
    if not made.files:
        files, lost = _anew(read, known, layout, launcher, made.by_hand)
        notes = [f"not carried: {line}" for line in lost]
        if not fresh and not made.by_hand:
            notes.append("A log, or so long a file, cannot be edited: a new script is written.")
        made = replace(made, files=files, notes=notes)
    layout = made.layout or layout
    return Resized(
        read=read,
        before=known.layout,
        layout=layout,
        job=known.job,
        changes=_changes(known.layout, layout),
        kept=_kept(known, layout),
        notes=[
            *notes_on(known.model, known.layout, layout),
            *made.notes,
            *(f"not read: {line}" for line in read.unread),
        ],
        files=made.files,
        in_place=made.in_place,
        diff=made.diff,
        by_hand=made.by_hand,
    )


def _can_run(read: CheckResult, known: Known) -> Callable[[Layout[int]], bool]:
    """Return whether a layout is nothing that the framework has no setting for.

    What it lacks for the layout that was read does not count: that one runs.
    """
    name = read.launch.framework

    def lacks(x: Layout[int]) -> set[str]:
        return {f.field for f in unsupported(known.model, None, known.job, x, name)}

    already = lacks(known.layout)
    return lambda x: lacks(x) <= already


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Files of a resized launch; none where it could not be edited."""

    files: dict[str, str] = field(default_factory=dict[str, str])
    layout: Layout[int] | None = None
    in_place: bool = False
    diff: str = ""
    by_hand: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])


def _in_place(
    source: str | Path | Sequence[str], read: CheckResult, known: Known, layout: Layout[int]
) -> _Made:
    """Edit the launch itself; ``by_hand`` of the result says where that is not possible."""
    texts = texts_of(source)
    if texts is None:
        return _Made()
    per_node = _per_node(read.launch.gpus_per_node, layout.world_size)
    wanted = Wanted(layout=layout, job=known.job, gpus_per_node=per_node)
    edited = edit(texts, read.launch, known.layout, wanted)
    reached, unlike = _unlike(edited.files, read, known, layout)
    by_hand = edited.by_hand or unlike
    if by_hand:
        return _Made(by_hand=by_hand)
    notes = _about_nodes(read.launch, layout.world_size, per_node, edited.files)
    notes += [f"moves along: {line}" for line in edited.also]
    return _Made(
        files=edited.files,
        layout=reached,
        in_place=True,
        diff=_diff(texts, edited.files),
        notes=notes,
    )


def _anew(
    read: CheckResult, known: Known, layout: Layout[int], launcher: str, by_hand: Sequence[str]
) -> tuple[dict[str, str], Sequence[str]]:
    """Return the files of a launch that is written again, and what they do not carry."""
    name = read.launch.framework
    if name == "skyrl" and read.launch.words.get("rl_trainer"):
        rule = "What is written for SkyRL is its SFT trainer; this launch starts the RL trainer."
        remedy = "; ".join(by_hand) or "Leave --fresh out: the launch itself is edited."
        raise LaunchError("launch", read.launch.program, rule, remedy)
    carried = carried_to(read, known, name)
    try:
        files = launch_files(known.model, None, known.job, layout, name, launcher, carried)
    except LaunchError as error:
        remedy = "Change in the launch itself: " + "; ".join(by_hand) if by_hand else error.remedy
        raise LaunchError(error.field, error.value, error.rule, remedy) from None
    return files, carried.lost


EVERY_BYTE: Final = "surrogateescape"
"""How text is decoded, and has to be encoded again, so that no byte of a file changes."""


MOST_EDITED: Final = 100_000
"""Characters; editing reads a file some dozens of times."""


def texts_of(source: str | Path | Sequence[str]) -> dict[str, str] | None:
    """Return the texts of a launch, its script first, or None where there is none to edit.

    Python programs beside a script belong to it. A command becomes one line; a log is no launch
    that could be edited, and neither is a file that is longer than any script.
    """
    if not isinstance(source, str | Path):
        return {"command.sh": shlex.join(source) + "\n"}
    path = Path(source)
    text = read_text(path, EVERY_BYTE)
    if len(text) > MOST_EDITED or re.search(r"-{4,} arguments -{4,}", text):
        return None
    texts = {str(path): text}
    if path.suffix.lower() not in (".yaml", ".yml", ".json", ".toml", ".py"):
        for name in dict.fromkeys(re.findall(r"(?<![\w./-])[\w./-]{1,200}\.py\b", text)):
            beside = path.parent / name
            if beside.is_file() and beside.stat().st_size < MAX_BYTES:
                texts[name] = read_text(beside, EVERY_BYTE)
    return texts


def _unlike(
    files: dict[str, str], read: CheckResult, known: Known, layout: Layout[int]
) -> tuple[Layout[int] | None, list[str]]:
    """Return the layout that edited files say, and what they say otherwise than wanted."""
    name, *rest = files
    world = layout.world_size
    beside = {n: files[n] for n in rest}
    framework = read.launch.framework
    try:
        again = read_document(files[name], name, gpus=world, framework=framework, beside=beside)
        x = again.layout(world)
        job = again.job(x)
    except MeshwrightError as error:
        return None, [str(error)]
    a, b = to_dict(plain(x)), to_dict(plain(layout))
    own = _OWN if framework == "torchtitan" else ()
    differ = [k for k in {**a, **b} if a.get(k) != b.get(k) and k not in own]
    found = [f"{k}: {a.get(k)} -> {b.get(k)}" for k in differ]
    if (job.gbs, job.seq_len) != (known.job.gbs, known.job.seq_len):
        found.append(f"global batch: {job.gbs} -> {known.job.gbs}")
    return x if own else layout, found


_OWN: Final = ("pipeline_layout", "account_for_embedding", "account_for_loss", "zero")
"""What torchtitan makes of the number of stages by itself, where it is not told."""


def plain(x: Layout[int]) -> Layout[int]:
    """Return the layout without a communication of context parallelism that it has not."""
    return replace(x, cp_comm=CpComm.p2p) if x.cp == 1 else x


def _per_node(before: int | None, gpus: int) -> int:
    """Return the GPUs of a node: as many as before, or the most that divide both numbers."""
    if not before:
        return 0
    return gpus if gpus < before else math.gcd(gpus, before)


def _diff(before: dict[str, str], after: dict[str, str]) -> str:
    return "".join(
        line
        for name, text in before.items()
        for line in difflib.unified_diff(
            text.splitlines(keepends=True),
            after[name].splitlines(keepends=True),
            name,
            name,
            n=1,
        )
    )


def _about_nodes(launch: Launch, gpus: int, per_node: int, files: dict[str, str]) -> list[str]:
    """Return what a person has to see to: where processes start is not always in the launch."""
    if launch.gpus is None:
        return [f"The launch does not say how many processes it starts: start {gpus}."]
    before = -(-launch.gpus // (launch.gpus_per_node or launch.gpus))
    nodes = gpus // (per_node or gpus)
    text = next(iter(files.values()))
    found: list[str] = []
    if before == 1 < nodes and "srun" not in text and not launch.words.get("rl_trainer"):
        found.append(
            f"It ran on one node and needs {nodes}: start it on every node, with the node's rank"
            " and the first node's address."
        )
    if nodes > 1 and "--standalone" in text:
        found.append("--standalone holds torchrun to one node: give a rendezvous instead.")
    if before != nodes and re.search(r"(?m)^#SBATCH.*\s(--nodelist|-w)\b", text):
        found.append(f"#SBATCH --nodelist names nodes: it has to name {nodes}.")
    old = {str(launch.gpus), str(before), str(launch.gpus_per_node)}
    return found + _stale(files, old - {str(gpus), str(nodes), str(per_node)})


_COUNTS: Final = re.compile(
    r"(?i)\b\w{0,40}(world_?size|gpus|nodes|devices)\w{0,40}\s{0,9}[=:]\s{0,9}[\"']?(\d{1,7})\b"
)


def _stale(files: dict[str, str], old: set[str]) -> list[str]:
    """Return lines that still name an old number of GPUs or nodes, which no setting depends on."""
    return [
        f"{Path(name).name} line {number} still says {match.group().strip()}; nothing that was read"
        " depends on it."
        for name, text in files.items()
        for number, line in enumerate(text.splitlines(), 1)
        if not re.match(r"\s*#(?!SBATCH)", line)
        for match in _COUNTS.finditer(line)
        if match[2] in old and match[2] != "1"
    ][:8]


def _changes(before: Layout[int], after: Layout[int]) -> dict[str, tuple[object, object]]:
    a, b = to_dict(before), to_dict(after)
    return {k: (a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)}


def _kept(known: Known, after: Layout[int]) -> list[str]:
    job = known.job
    micro = [job.gbs // (x.mbs * x.dp) for x in (known.layout, after)]
    return [
        f"global batch {job.gbs} sequences, {job.tokens_per_step} tokens a step",
        f"sequence length {job.seq_len}, precision {job.precision.name}",
        f"microbatches a step and pipeline: {micro[0]} before, {micro[1]} now",
    ]


def notes_on(
    model: Model, a: Layout[int], b: Layout[int], divisors_of: tuple[int, int] = (128, 128)
) -> list[str]:
    """Return what silently differs between two layouts of a run: data order, padded vocabulary.

    ``divisors_of`` is what the vocabulary of each is padded to a multiple of, times TP.
    """
    notes: list[str] = []
    if a.dp != b.dp:
        notes.append(
            f"Data parallelism {a.dp} -> {b.dp}: samples come in another order, and saved"
            " positions of the data loader do not carry over; weights and optimizer state do if"
            " the checkpoint is reshardable."
        )
    padded = [
        padded_vocabulary(model.vocab_size, x.tp, divisor)
        for x, divisor in zip((a, b), divisors_of, strict=True)
    ]
    if padded[0] != padded[1]:
        notes.append(
            f"Padded vocabulary {padded[0]} -> {padded[1]} (a multiple of the divisor times tp):"
            " checkpoints do not fit without re-padding, and loss curves are not comparable."
        )
    return notes


def padded_vocabulary(vocab_size: int, tp: int, divisor: int = 128) -> int:
    """Return the vocabulary rounded up to a multiple of ``divisor*tp``, as Megatron pads it."""
    unit = divisor * tp
    return -(-vocab_size // unit) * unit

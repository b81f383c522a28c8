"""A launch moved to another layout in its own file: numbers change, everything else stays.

Which number decides what is not worked out a second time: a number is replaced by a candidate, the
file is read again, and the candidate stands when the reading says what was wanted and nothing else
that was given has changed. So variables, defaults, arithmetic, keys of YAML and batch options are
all the same here, and what was edited has been read back by construction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Final

from meshwright.errors import MeshwrightError
from meshwright.frameworks.launch import Launch
from meshwright.frameworks.quantities import (
    FROM_ZERO,
    WORDS,
    Quantities,
    Wanted,
    quantities,
    targets,
)
from meshwright.frameworks.read import read_document
from meshwright.frameworks.rewritings import (
    Files,
    batch_options,
    inserted,
    numbers,
    removed,
    switches,
)
from meshwright.frameworks.torchtitan.read import NAMES
from meshwright.frameworks.words import DEGREES
from meshwright.parallel.layout import Layout

_UNCHOSEN: Final = ("default", "derived", "changed")
"""How the origin of a value begins that the launch does not give."""
_PLACING: Final = re.compile(
    r"(?i)node|gpus|engines|devices|parallel|degree|nproc|replica|overlap_p2p|pp_microbatches"
)
"""Arguments that a rule may ask to follow the number of GPUs."""
_TITAN: Final = {
    name: NAMES[word].rpartition(".")[2] for name, word in DEGREES.items() if word in NAMES
}
_CHUNKS: Final = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The files after editing.

    ``by_hand`` names what could not be put there, with its place and the value to put; with any,
    the files are not whole. ``also`` are arguments that moved along, computed from what changed.
    """

    files: dict[str, str]
    by_hand: list[str]
    also: list[str]


def edit(files: Files, launch: Launch, before: Layout[int], wanted: Wanted) -> Edited:
    """Return ``files`` (the launch first, Python files beside it after) saying what is wanted.

    ``launch`` is what they say now, in layout ``before``.
    """
    editor = _Editor(files=dict(files), launch=launch, before=before, wanted=wanted)
    editor.batch()
    editor.solve()
    return Edited(files=editor.files, by_hand=editor.by_hand(), also=editor.also())


View = Callable[[Files], Files]
"""The files as another way of starting them sees them."""


def _without_batch_options(files: Files) -> Files:
    """As ``bash`` runs the script, where defaults count instead of what Slurm sets."""
    name, *rest = files
    text = re.sub(r"(?m)^#SBATCH", "#-BATCH", files[name])
    return {name: text, **{n: files[n] for n in rest}}


def _script_alone(files: Files) -> Files:
    """The script without what the Python files beside it say."""
    name, *rest = files
    return {name: files[name], **dict.fromkeys(rest, "")}


@dataclass(kw_only=True)
class _Editor:
    files: dict[str, str]
    launch: Launch
    before: Layout[int]
    wanted: Wanted
    views: list[View] = field(default_factory=list[View])
    given: dict[str, object] = field(default_factory=dict[str, object])
    targets: Quantities = field(default_factory=dict[str, int | str])

    def __post_init__(self) -> None:
        self.targets = targets(quantities(self.launch), self.before, self.wanted)
        self.given = {
            word: setting.value
            for word, setting in self.launch.settings.items()
            if word not in {*WORDS.values(), *_CHUNKS, "pipeline_schedule"}
            and not setting.origin.startswith(_UNCHOSEN)
        }
        for view in (_without_batch_options, _script_alone):
            seen = self.read(view(self.files)) if view(self.files) != self.files else None
            if seen is not None and seen.gpus == self.launch.gpus:
                self.views.append(view)

    def read(self, files: Files) -> Launch | None:
        """Return the launch that some files are, or None when they are none any more."""
        name, *rest = files
        gpus = None if self.launch.gpus else self.wanted.layout.world_size
        beside = {n: files[n] for n in rest}
        framework = self.launch.framework
        try:
            return read_document(files[name], name, gpus=gpus, framework=framework, beside=beside)
        except MeshwrightError:
            return None

    def left(self, files: Files, kept: Set[str] = frozenset()) -> list[str]:
        """Return what is not as wanted yet: ``name``, ``name@view``, and "given".

        Other views are not looked at when something of ``kept`` is among it already.
        """
        found: list[str] = []
        for number, view in enumerate((dict[str, str], *self.views)):
            launch = self.read(view(files))
            now = {} if launch is None else quantities(launch)
            if not number and not self.launch.gpus:
                now["gpus"] = 0
            names = _IN_VIEWS if number else tuple(self.targets)
            sign = f"@{number}" if number else ""
            found += [f"{n}{sign}" for n in names if now.get(n) != self.targets[n]]
            if not number and (launch is None or self.differs(launch)):
                found.append("given")
            if not kept.isdisjoint(found):
                break
        return found

    def differs(self, launch: Launch) -> list[str]:
        """Return the words that the launch gave and that are read as something else now."""
        words = launch.words
        return [w for w, value in self.given.items() if w in words and words[w] != value]

    def batch(self) -> None:
        """Bring the batch options to the new nodes; they may be what all else is read from."""
        old, new = self.launch.gpus_per_node, self.wanted.gpus_per_node
        if not old or not self.launch.gpus:
            return
        nodes = -(-self.launch.gpus // old), self.wanted.layout.world_size // new
        main = next(iter(self.files))
        self.files[main] = batch_options(self.files[main], (nodes[0], old), (nodes[1], new))

    def solve(self) -> None:
        """Settle every quantity in turn, and what the framework's rules ask to follow them."""
        views = [f"{n}@{number}" for number in (1, 2)[: len(self.views)] for n in _IN_VIEWS]
        order = [*self.targets, *views]
        open_now = self.left(self.files)
        for at, name in enumerate(order):
            if name in open_now:
                self._settle(name, order[:at], open_now)
                open_now = self.left(self.files)
        self._obey()

    def _settle(self, name: str, before: Iterable[str], open_now: Sequence[str]) -> None:
        """Take the candidate that settles a quantity and leaves least to do after it."""
        kept = {*before, "given"} - {*open_now} | {name}
        for candidates in self._kinds(name):
            best: tuple[int, dict[str, str]] | None = None
            for files in candidates:
                left = self.left(files, kept)
                if not kept & {*left} and (best is None or len(left) < best[0]):
                    best = len(left), files
                    if len(left) < len(open_now):
                        break
            if best is not None:
                self.files = best[1]
                return

    def _kinds(self, name: str) -> Iterator[Iterable[dict[str, str]]]:
        """Yield the candidates that may settle a quantity, the most direct ones first."""
        name, _, view = name.partition("@")
        seen = self.read(self.views[int(view) - 1](self.files) if view else self.files)
        now = quantities(self.launch if seen is None else seen)
        old, new = now[name], self.targets[name]
        if isinstance(old, int) and isinstance(new, int) and name != "sp":
            if (name, new) == ("vpp", 1):
                yield self._without(name)
            if old > 0 and new > 0:
                yield numbers(self.files, lambda v: new if v == old else None)
                yield numbers(self.files, lambda v: _scaled(v, new, old))
                yield numbers(self.files, lambda v: _scaled(v, old, new))
            layers = self.launch.words.get("num_layers")
            if name == "vpp" and isinstance(layers, int) and new > 0:
                chunk = _scaled(layers, 1, new * int(now["pp"]))
                yield numbers(self.files, lambda _: chunk)
            if new == int(name not in FROM_ZERO):
                yield self._without(name)
        elif name == "sp":
            yield switches(self.files)
        else:
            yield self._without(name)
        yield self._with(name)

    def _with(self, name: str) -> Iterator[dict[str, str]]:
        """Give a quantity that the launch does not state, next to one that it states."""
        value = self.targets[name]
        if name == "gpus":
            nodes = int(value) // max(int(self.targets["gpus_per_node"]), 1)
            yield from self._with_nodes(str(nodes))
            return
        if name == "gbs":
            for beside, (key, unit) in self._whole_batches().items():
                yield from inserted(self.files, beside, key, str(int(value) * unit))
            return
        if self._states(WORDS.get(name, name)):
            return
        for other in ("tp", "pp", "cp", "ep", "mbs"):
            if not self._states(WORDS[other]):
                continue
            beside = self.launch.settings[WORDS[other]].origin.partition(",")[0]
            key = _sibling(beside, other, name)
            if key and name == "sp":
                bare = beside.startswith("--")
                yield from inserted(self.files, beside, key, "" if bare else "true")
                short = beside.rpartition(".")[2], key.rpartition(".")[2]
                yield from inserted(self.files, *short, "True")
            elif key:
                yield from inserted(self.files, beside, key, str(value))
                short = beside.rpartition(".")[2], key.rpartition(".")[2]
                yield from inserted(self.files, *short, str(value))

    def _whole_batches(self) -> dict[str, tuple[str, int]]:
        """Return how torchtitan is told the batch of a step, where it else follows the ranks."""
        return {
            "local_batch_size": ("global_batch_size", 1),
            "num_tokens_per_microbatch_per_dp_rank": (
                "num_tokens_per_train_step",
                self.wanted.job.seq_len,
            ),
        }

    def _states(self, word: str) -> bool:
        setting = self.launch.settings.get(word)
        return setting is not None and not setting.origin.startswith(_UNCHOSEN)

    def _with_nodes(self, nodes: str) -> Iterator[dict[str, str]]:
        """Say how many nodes there are, next to every number of GPUs a node."""
        files: dict[str, str] | None = None
        for key in pairs(self.launch.argv):
            sibling = next((key.replace(a, b) for a, b in _NODES.items() if key.endswith(a)), "")
            if sibling:
                files = next(inserted(files or self.files, key, sibling, nodes), files)
        if files is not None:
            yield files
        for spelled in ("--nproc_per_node", "--nproc-per-node"):
            yield from inserted(self.files, spelled, "--nnodes", nodes)

    def _without(self, name: str) -> Iterator[dict[str, str]]:
        keys = [WORDS[name], *(_CHUNKS if name == "vpp" else ())]
        flags = {"first": "decoder_first_pipeline_num_layers"}
        flags["last"] = "decoder_last_pipeline_num_layers"
        return removed(self.files, [*keys, *([flags[name]] if name in flags else [])])

    def _obey(self) -> None:
        """Move numbers that place other parts of the training where a rule asks for it now."""
        known = {*_errors(self.launch)}
        x, y = self.before, self.wanted.layout
        ratios = {(y.world_size, x.world_size), (y.tp, x.tp), (y.ep, x.ep), (x.dp, y.dp)}
        for _ in range(8):
            new = {*_errors(self.read(self.files))} - known
            if not new:
                return
            for candidates in (
                *(numbers(self.files, lambda v, r=r: _scaled(v, *r)) for r in ratios),
                switches(self.files),
            ):
                better = next((f for f in candidates if self._obeys(f, new, known)), None)
                if better is not None:
                    self.files = better
                    break
            else:
                return

    def _obeys(self, files: Files, new: set[str], known: set[str]) -> bool:
        launch = self.read(files)
        if launch is None or not {*_errors(launch)} - known < new:
            return False
        before = self.read(self.files)
        changed = _changed(before, launch) if before is not None else []
        placing = all(_PLACING.search(key) for key, _, _ in changed)
        return placing and not {*self.left(files)} - {*self.left(self.files)}

    def by_hand(self) -> list[str]:
        """Return every change that is wanted, with its place, when not all could be made."""
        left = [name.partition("@")[0] for name in self.left(self.files)]
        launch = self.read(self.files)
        known = _errors(self.launch)
        told = [message for id_, message in _errors(launch).items() if id_ not in known]
        lost = [] if launch is None else [w for w in self.given if w not in launch.words]
        told += [f"{word} would no longer be read" for word in lost]
        if not left and not told:
            return []
        before = quantities(self.launch)
        for name, value in self.targets.items():
            setting = self.launch.settings.get(WORDS.get(name, name))
            where = f" ({setting.origin})" if setting is not None else ""
            spoken = _SPOKEN.get(name, name) + where
            if before[name] != value:
                told.append(f"{spoken}: {before[name] or 'none'} -> {value or 'none'}")
            elif name in left:
                told.append(f"{spoken}: stays {value}")
        return told

    def also(self) -> list[str]:
        """Return the arguments that moved along with the wanted ones."""
        after = self.read(self.files)
        if after is None:
            return []
        wanted = {*WORDS.values(), *_CHUNKS, *_TITAN.values()}
        return [
            f"{key}: {old} -> {new}"
            for key, old, new in _changed(self.launch, after)
            if (name := key.rpartition(".")[2].lstrip("-").replace("-", "_")) not in wanted
            and not _WORLD.search(name)
        ]


_WORLD: Final = re.compile(r"nodes$|gpus_per_node$|devices$|data_parallel_\w+_degree$")
"""Settings that say how many processes start."""
_NODES: Final = {
    "num_gpus_per_node": "num_nodes",
    "n_gpus_per_node": "nnodes",
    "trainer.devices": "trainer.num_nodes",
}
"""How GPUs of a node end, and how the nodes beside them are called."""
_IN_VIEWS: Final = ("gpus_per_node", "gpus")
_SPOKEN: Final = {"gpus": "GPUs that are started", "gpus_per_node": "GPUs of a node"}


def _errors(launch: Launch | None) -> dict[str, str]:
    """Return the errors that a framework's own rules find, message by id."""
    found = () if launch is None else launch.findings
    return {f.id: f.message for f in found if f.severity == "error"}


def _scaled(value: int, times: int, by: int) -> int | None:
    """Return value*times/by where that is a whole number of at least 1."""
    whole, rest = divmod(value * times, max(by, 1))
    return whole if not rest and whole > 0 else None


def _sibling(beside: str, other: str, name: str) -> str:
    """Return how a quantity is called where another one is called ``beside``; "" if not known."""
    if other in _TITAN and _TITAN[other] in beside:
        return beside.replace(_TITAN[other], _TITAN[name]) if name in _TITAN else ""
    word, wanted = WORDS[other], WORDS.get(name, "")
    if beside.startswith("--"):
        word = word.replace("_", "-")
        wanted = (_CHUNKS[1] if name == "vpp" else wanted).replace("_", "-")
    return beside.replace(word, wanted) if wanted and word in beside else ""


def _changed(before: Launch, after: Launch) -> list[tuple[str, str, str]]:
    """Return the arguments of a launch whose values differ in another one."""
    old, new = pairs(before.argv), pairs(after.argv)
    return [(k, old[k], new.get(k, "")) for k in old if k in new and old[k] != new[k]]


def pairs(argv: Iterable[str]) -> dict[str, str]:
    """Return the values of the arguments of a launch by flag or path, joined by blanks."""
    found: dict[str, str] = {}
    key = ""
    for word in argv:
        name, sign, value = word.partition("=")
        if sign:
            key, found[name] = name, value
        elif word.startswith("--"):
            key, found[word] = word, ""
        else:
            found[key] = f"{found.get(key, '')} {word}".strip()
    return found

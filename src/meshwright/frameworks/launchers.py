"""What starts the processes: torchrun, srun, mpirun and the like, and how many they start."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshwright.errors import did_you_mean
from meshwright.frameworks.shell import Command, Script, Word

_PLAIN_WRAPPERS: Final = frozenset({"exec", "time", "nohup", "sudo", "env", "stdbuf", "nice"})
_TORCHRUN_SWITCHES: Final = frozenset(
    {
        "--standalone",
        "--no-python",
        "--no_python",
        "-m",
        "--module",
        "--run-path",
        "--run_path",
        "--virtual-local-rank",
        "--virtual_local_rank",
        "--enable-gpu-health-check",
    }
)
_TORCHRUN_VALUES: Final = frozenset(
    {
        *("nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf"),
        *("max-restarts", "monitor-interval", "start-method", "role", "log-dir", "redirects"),
        *("tee", "node-rank", "master-addr", "master-port", "local-addr", "logs-specs"),
        *("local-ranks-filter", "numa-binding", "event-log-handler", "duplicate-stdout-filters"),
        *("duplicate-stderr-filters", "signals-to-handle", "shutdown-timeout", "r", "t"),
    }
)
"""Options of torchrun that take a value. Ref: ``torch/distributed/run.py``, PyTorch 2.13."""
_PYTHON_VALUES: Final = frozenset({"-W", "-X"})
_UV_SWITCHES: Final = frozenset(
    {
        "--isolated",
        "--no-sync",
        "--active",
        "--frozen",
        "--locked",
        "--no-project",
        "--all-extras",
        "--quiet",
        "-q",
    }
)
_SRUN_COUNTS: Final = {
    "nodes": "nodes",
    "N": "nodes",
    "ntasks-per-node": "per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gpus_per_node",
    "ntasks": "tasks",
    "n": "tasks",
    "gpus": "gpus",
    "G": "gpus",
}
_SRUN_SWITCHES: Final = frozenset(
    {
        "-l",
        "--label",
        "-u",
        "--unbuffered",
        "--exclusive",
        "--overlap",
        "--no-container-mount-home",
        "--pty",
        "-v",
        "--no-container-entrypoint",
        "--container-writable",
        "--kill-on-bad-exit",
        "-K",
        "-W",
    }
)
_MPI_COUNTS: Final = {
    "np": "tasks",
    "n": "tasks",
    "npernode": "per_node",
    "N": "per_node",
    "map-by": "",
}
_MPI_SWITCHES: Final = frozenset(
    {
        "--allow-run-as-root",
        "--tag-output",
        "-tag-output",
        "--oversubscribe",
        "--report-bindings",
        "-v",
    }
)
_MPI_PAIRS: Final = frozenset({"-mca", "--mca", "-x", "-gmca", "--bind-to", "-bind-to", "--map-by"})


@dataclass(kw_only=True)
class Counts:
    """How many processes are started, as far as it is written; 0 where it is not."""

    nodes: int = 0
    per_node: int = 0
    gpus_per_node: int = 0
    tasks: int = 0
    gpus: int = 0
    torchrun: bool = False

    @property
    def total(self) -> int:
        """Return the number of processes, one a GPU; 0 where it is not known.

        Under ``torchrun`` the tasks of ``srun`` are nodes.
        """
        if self.torchrun:
            return (self.nodes or 1) * self.per_node
        if self.tasks:
            return self.tasks
        if self.nodes and (self.per_node or self.gpus_per_node):
            return self.nodes * (self.per_node if self.per_node > 1 else self.gpus_per_node)
        return self.gpus or self.per_node or self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class Started:
    """A program that a command starts, with its arguments and environment.

    ``program`` is a script path or a module. ``counts`` as written around it.
    """

    program: Word
    args: tuple[Word, ...]
    env: Mapping[str, str]
    counts: Counts
    line: int
    unread: tuple[str, ...] = ()


@dataclass
class _Walk:
    words: Sequence[Word]
    counts: Counts
    env: dict[str, str]
    at: int = 0
    unread: list[str] = field(default_factory=list[str])

    @property
    def text(self) -> str:
        return self.words[self.at].text if self.at < len(self.words) else ""

    def option(self, switches: Iterable[str]) -> tuple[str, Word | None]:
        """Take one option; its value is joined by ``=`` or is the next word."""
        word = self.words[self.at]
        self.at += 1
        name, sign, value = word.text.partition("=")
        if sign:
            return name, Word(value, word.line, word.variables, word.unknown)
        short = re.fullmatch(r"(-[NnG])(\d+)", word.text)
        if short:
            return short[1], Word(short[2], word.line)
        if name in switches or self.at >= len(self.words):
            return name, None
        self.at += 1
        return name, self.words[self.at - 1]

    def count(self, field_name: str, option: str, value: Word | None) -> None:
        """Keep a number of processes; what is not a plain number is named."""
        if value is None or not field_name:
            return
        digits = value.text.rpartition(":")[2] if field_name == "gpus_per_node" else value.text
        if digits.isdecimal() and len(digits) < 8 and not value.unknown:
            setattr(self.counts, field_name, int(digits))
        else:
            self.unread.append(f"line {value.line}: {option} {value.text} is not a known number")


def sbatch_counts(script: Script) -> Counts:
    """Return the numbers that the ``#SBATCH`` lines state."""
    counts = Counts()
    walk = _Walk([Word(o, 0) for o in script.sbatch], counts, {})
    while walk.at < len(walk.words):
        if walk.text.startswith("-"):
            name, value = walk.option(("--exclusive", "--requeue"))
            walk.count(_SRUN_COUNTS.get(name.lstrip("-"), ""), name, value)
        else:
            walk.at += 1
    return counts


def started(command: Command, around: Counts | None = None) -> Started | None:
    """Return the Python program that a command starts, or None when it starts none.

    ``around`` are the counts of the batch job that the command runs in.
    """
    around = around or Counts()
    counts = Counts(**{k: getattr(around, k) for k in ("nodes", "gpus_per_node", "tasks", "gpus")})
    if around.per_node > 1:
        counts.per_node = around.per_node
    walk = _Walk(command.words, counts, dict(command.env))
    for _ in range(12):
        name = walk.text.rpartition("/")[2]
        if walk.at >= len(walk.words):
            return None
        step = _STEPS.get(name)
        if step is None and re.fullmatch(r"python[\d.]{0,6}", name):
            step = _python
        if step is None:
            break
        walk.at += 1
        step(walk)
    return _program(walk, command.line)


def _program(walk: _Walk, line: int) -> Started | None:
    if walk.at >= len(walk.words) or walk.text.startswith("-"):
        return None
    return Started(
        program=walk.words[walk.at],
        args=tuple(walk.words[walk.at + 1 :]),
        env=walk.env,
        counts=walk.counts,
        line=line,
        unread=tuple(walk.unread),
    )


def _plain(walk: _Walk) -> None:
    while "=" in walk.text and re.match(r"[A-Za-z_]\w*=", walk.text):
        name, _, value = walk.text.partition("=")
        walk.env[name] = value
        walk.at += 1


def _srun(walk: _Walk) -> None:
    while walk.text.startswith("-"):
        if walk.text == "--":
            walk.at += 1
            return
        name, value = walk.option(_SRUN_SWITCHES)
        walk.count(_SRUN_COUNTS.get(name.lstrip("-"), ""), name, value)


def _mpirun(walk: _Walk) -> None:
    while walk.text.startswith("-"):
        name, value = walk.option(_MPI_SWITCHES)
        if name in _MPI_PAIRS and name.lstrip("-") in ("mca", "gmca"):
            walk.at += 1
        elif name == "-x" and value is not None and "=" in value.text:
            key, _, text = value.text.partition("=")
            walk.env[key] = text
        walk.count(_MPI_COUNTS.get(name.lstrip("-"), ""), name, value)


def _torchrun(walk: _Walk) -> None:
    counts = walk.counts
    tasks, counts.torchrun, counts.per_node = counts.tasks, True, 0
    nodes, counts.nodes, counts.tasks = counts.nodes, 0, 0
    while walk.text.startswith("-"):
        name, value = walk.option(_TORCHRUN_SWITCHES)
        plain = name.lstrip("-").replace("_", "-")
        if plain not in _TORCHRUN_VALUES and name not in _TORCHRUN_SWITCHES:
            meant = did_you_mean(plain, _TORCHRUN_VALUES, most=1)
            walk.unread.append(f"torchrun has no option {name[:80]}. {meant}")
        if plain == "nnodes" and value is not None and re.fullmatch(r"(\d+):\1", value.text):
            value = Word(value.text.partition(":")[0], value.line)
        if plain == "nproc-per-node" and value is not None and value.text in ("gpu", "auto"):
            counts.per_node = counts.gpus_per_node
        else:
            known = {"nnodes": "nodes", "nproc-per-node": "per_node"}
            walk.count(known.get(plain, ""), name, value)
    counts.nodes = counts.nodes or nodes or tasks
    counts.per_node = counts.per_node or (0 if walk.unread else 1)


def _python(walk: _Walk) -> None:
    while walk.text.startswith("-"):
        if walk.text == "-m":
            walk.at += 1
            _module(walk)
            return
        walk.at += 2 if walk.text in _PYTHON_VALUES else 1


def _module(walk: _Walk) -> None:
    if walk.text in ("torch.distributed.run", "torch.distributed.launch"):
        walk.at += 1
        _torchrun(walk)


def _uv(walk: _Walk) -> None:
    if walk.text == "run":
        walk.at += 1
    while walk.text.startswith("-"):
        walk.option((*_UV_SWITCHES, "--"))


def _ray(walk: _Walk) -> None:
    while walk.at < len(walk.words) and walk.text != "--":
        walk.at += 1
    walk.at += 1


def _accelerate(walk: _Walk) -> None:
    walk.at += walk.text == "launch"
    while walk.text.startswith("-"):
        name, value = walk.option(("--multi_gpu", "--use_fsdp", "--use_deepspeed"))
        plain = name.lstrip("-").replace("_", "-")
        walk.count({"num-processes": "tasks"}.get(plain, ""), name, value)


_STEPS: Final = {
    **dict.fromkeys(_PLAIN_WRAPPERS, _plain),
    "srun": _srun,
    "mpirun": _mpirun,
    "mpiexec": _mpirun,
    "torchrun": _torchrun,
    "uv": _uv,
    "ray": _ray,
    "accelerate": _accelerate,
}

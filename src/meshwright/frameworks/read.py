"""Reading any launch: which framework it is for, and what it says.

A script is parsed, never run; YAML, TOML and Python are read as data. What could not be read is
listed in the launch, not guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Final, Literal

from meshwright.errors import DocumentError, LaunchError, did_you_mean
from meshwright.findings import Finding
from meshwright.frameworks import overrides as paths
from meshwright.frameworks.interpolation import resolved
from meshwright.frameworks.launch import FRAMEWORKS, TITLES, Launch, Reading, Setting
from meshwright.frameworks.launchers import Counts, Started, sbatch_counts, started
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.shell import Command, Script, Word, parse
from meshwright.frameworks.shell_words import MAX_BYTES
from meshwright.frameworks.words_model import find_model

Kind = Literal["shell", "yaml", "toml", "python", "dump"]

_PROGRAMS: Final = {
    "megatron-lm": r"pretrain_(gpt|mamba|hybrid|bert|t5|vlm|retro)\w*\.py$|megatron/training",
    "megatron-bridge": r"run_recipe\.py$|megatron[./]bridge|run_plugin|setup_experiment\.py$",
    "nemo": r"^nemo$|nemo[./]collections",
    "skyrl": r"skyrl",
    "verl": r"^verl[./]|/verl/|^verl$",
    "torchtitan": r"torchtitan|run_train\.sh$",
}
_MEGATRON_FLAGS: Final = frozenset(
    {
        "--tensor-model-parallel-size",
        "--pipeline-model-parallel-size",
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--micro-batch-size",
        "--global-batch-size",
        "--seq-length",
        "--use-distributed-optimizer",
    }
)
_PATHS: Final = {
    "skyrl": r"trainer\.(policy|placement|ref)\.|generator\.inference_engine\.|megatron_config\."
    r"|trainer\.policy_mini|trainer\.micro_train|micro_train_batch_size_per_gpu$|placement\.num_",
    "verl": r"actor_rollout_ref\.|trainer\.n_gpus_per_node$|critic\.|algorithm\.adv",
    "nemo": r"trainer\.strategy\.|MegatronStrategy\.|trainer\.(devices|num_nodes)$"
    r"|model\.config\.|GPTConfig\.",
    "megatron-bridge": r"(model|train|ddp|comm_overlap|dist|mixed_precision|scheduler|validation)"
    r"\.(?!config\.)|mixed_precision$|GPTModelProvider\.|(optimizer|checkpoint|logger|dataset)\.",
    "torchtitan": r"(parallelism|activation_checkpoint|compile)\.|training\.(local_batch|num_tok"
    r"|max_context|seq_len|steps)|(job|experimental)\.",
}
_TITAN_FLAG: Final = re.compile(
    r"--(parallelism|training|activation_checkpoint|compile|comm|checkpoint|optimizer|metrics"
    r"|profiler|profiling|model|debug|job|experimental|lr_scheduler)\.[a-z_.\-]+(=.*)?",
    re.DOTALL,
)

_MATTERS: Final = re.compile(
    r"parallel|batch|len(gth)?$|n_gpus|nnodes|num_nodes|num_gpus|devices$|recompute|tokens|degree"
    r"|layers|samples|rollout\.n$|(^|actor\.|trainer\.)strategy$|model\.path$|dtype|precision|fp8|hidden|heads|experts"
)
"""Settings that decide layout, job or model: told when their value is not known."""

MOST_ARGUMENTS: Final = 20_000
_NOT_LAUNCHERS: Final = frozenset(
    {
        *("echo", "printf", "cat", "cp", "mv", "rm", "ls", "cd", "mkdir", "chmod", "tee", "sed"),
        *("grep", "awk", "head", "tail", "git", "pip", "set", "exit", "wait", "sleep", "module"),
        *("rsync", "scp", "touch", "find", "which", "read", "trap", "ulimit", "tar", "wget"),
        *(":", "true"),
    }
)
"""Commands that name programs without starting them."""


def read_launch(
    source: str | Path | Sequence[str],
    *,
    gpus: int | None = None,
    framework: str | None = None,
    env: Mapping[str, object] | None = None,
) -> Launch:
    """Read a launch from a file, or from the words of a command.

    ``gpus`` overrides what the launch says; ``framework`` states what it is for where the content
    does not tell. ``env`` are environment variables and facts of the machine as in
    ``check_launch``; the script's own exports come first.

    Raises ``DocumentError`` when the file cannot be used and ``LaunchError`` when it is not clear
    which framework it is for.
    """
    if framework is not None and framework not in FRAMEWORKS:
        remedy = did_you_mean(framework, FRAMEWORKS)
        raise LaunchError("framework", framework, "It is not a known framework.", remedy)
    if gpus is not None and not 1 <= gpus <= 2**20:
        raise LaunchError("gpus", gpus, "It lies between 1 and 1048576.", "Use 1 or more.")
    if isinstance(source, str | Path):
        text = read_text(Path(source))
        return read_document(text, str(source), gpus=gpus, framework=framework, env=env)
    words = tuple(Word(str(text), 0) for text in source)
    command = Command(words=words, line=0, env={})
    script = Script(commands=(command,), sbatch=(), env={}, unread=())
    return _from_script(script, gpus, framework, env)


def read_text(path: Path, errors: str = "replace") -> str:
    """Return a file's text. Raises ``DocumentError`` when it is missing, no file or too large.

    ``errors``: what becomes of bytes that are not UTF-8, in the words of ``bytes.decode``.
    """
    try:
        if not path.is_file():
            remedy = "Give the path of a launch script or configuration."
            raise DocumentError("file", str(path), _why_no_file(path), remedy)
        size = path.stat().st_size
        if size > 64 * MAX_BYTES:
            rule = f"A launch has at most {64 * MAX_BYTES} bytes; this has {size}."
            raise DocumentError("file", str(path), rule, "Give the launch script itself.")
        return path.read_bytes().decode("utf-8", errors=errors)
    except (OSError, ValueError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError("file", str(path), f"It cannot be read: {error}.", "") from None


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return "It is a folder."
    if path.exists():
        return "It is a pipe or a device, which can be read only once; a launch is read again."
    return "There is no such file."


def read_document(
    text: str,
    name: str,
    *,
    gpus: int | None = None,
    framework: str | None = None,
    env: Mapping[str, object] | None = None,
    beside: Mapping[str, str] | None = None,
) -> Launch:
    """Read a launch from the text of a file called ``name``; see ``read_launch``.

    ``beside`` are texts of the Python programs that it starts, by the names it gives them; others
    are looked for in its folder.
    """
    kind = _kind_of(text, name)
    if kind == "dump":
        from meshwright.frameworks.megatron_lm.read import read_dump

        reading = read_dump(text[: 8 * MAX_BYTES])
        return _launch("megatron-lm", reading, gpus or reading.gpus, {}, ())
    if kind == "shell":
        nearby = _Nearby(folder=Path(name).parent, texts=beside or {})
        return _from_script(parse(text), gpus, framework, env, nearby)
    origin = Path(name).name
    if len(text) > MAX_BYTES:
        rule = f"A configuration has at most {MAX_BYTES} characters."
        raise DocumentError("file", name, rule, "Give the launch configuration itself.")
    readers = {"yaml": paths.from_yaml, "toml": paths.from_toml, "python": paths.from_python}
    found = readers[kind](text, origin)
    framework = framework or _framework_of("", [], found)
    launch = _read_overrides(framework, found, None, gpus, {}, env, ())
    return replace(launch, given=tuple(map(_as_word, found)))


def _kind_of(text: str, name: str) -> Kind:
    suffix = Path(name).suffix.lower()
    if suffix in (".yaml", ".yml", ".json"):
        return "yaml"
    if suffix in (".toml", ".py"):
        return "toml" if suffix == ".toml" else "python"
    head = text[: 4 * MAX_BYTES]
    if re.search(r"-{4,} arguments -{4,}", head):
        return "dump"
    return "yaml" if head.lstrip().startswith("{") else "shell"


def _from_script(
    script: Script,
    gpus: int | None,
    framework: str | None,
    env: Mapping[str, object] | None,
    nearby: _Nearby | None = None,
) -> Launch:
    around = sbatch_counts(script)
    found: list[tuple[Started, str]] = []
    stated: list[tuple[Started, str]] = []
    unclear: LaunchError | None = None
    for command in script.commands:
        candidate = _candidate(command, around)
        if candidate is None:
            continue
        try:
            overrides = [*_beside(candidate, nearby), *_overrides(candidate)]
            named = _framework_of(candidate.program.text, candidate.args, overrides)
            found.append((candidate, framework or named))
        except LaunchError as error:
            if framework is not None and (candidate.args or "=" in candidate.program.text):
                stated.append((candidate, framework))
            elif len(error.remedy) and error.value:
                unclear = unclear or error
    found = found or stated
    if not found:
        raise _submitted(script) or unclear or _nothing_started()
    chosen, name = found[0]
    if len(chosen.args) > MOST_ARGUMENTS:
        rule = f"A launch has at most {MOST_ARGUMENTS} arguments; this has {len(chosen.args)}."
        raise DocumentError("launch", chosen.program.text[:80], rule, "Give the launch itself.")
    more = [f"line {s.line} also starts {s.program.text}; not read" for s, _ in found[1:4]]
    unread = (*script.unread, *chosen.unread, *more)
    world = gpus or chosen.counts.total or None
    outside = {k: v for k, v in (env or {}).items() if isinstance(v, str) and "." not in k}
    environment = {**outside, **chosen.env}
    if name == "megatron-lm":
        from meshwright.frameworks.megatron_lm.read import read

        reading = read(chosen.args, world, {**environment, **(env or {})})
        launch = _launch(name, reading, world, environment, unread)
    else:
        beside = _beside(chosen, nearby)
        overrides = [*beside, *_overrides(chosen)]
        launch = _read_overrides(name, overrides, chosen, gpus, environment, env, unread)
        launch = replace(launch, given=tuple(map(_as_word, beside)))
    return _with_machine(launch, chosen, script)


def _as_word(override: Override) -> Word:
    """Return a setting of a document as a word of a command line."""
    text = f"{override.prefix}{override.path}={override.value}"
    return Word(text, 0, (), override.unknown)


def _nothing_started() -> LaunchError:
    rule = "No training of a known framework is started here."
    return LaunchError("launch", None, rule, f"State --framework, one of {', '.join(FRAMEWORKS)}.")


def _submitted(script: Script) -> LaunchError | None:
    """Return what to say of a script that only starts another one."""
    for command in script.commands:
        program, *rest = (word.text for word in command.words)
        files = [w for w in rest if w.endswith((".sh", ".sbatch", ".slurm"))]
        if program.rpartition("/")[2] in ("sbatch", "bash", "sh", "source", ".") and files:
            rule = f"No training is started here; line {command.line} hands over to {files[0]}."
            return LaunchError("launch", files[0], rule, "Check that file.")
    return None


def _candidate(command: Command, around: Counts) -> Started | None:
    """Return what a command starts; of an unknown launcher, the first Python program in it."""
    if command.words[0].text.rpartition("/")[2] in _NOT_LAUNCHERS:
        return None
    first = started(command, around)
    if first is not None and _looks_like_program(first.program.text):
        return first
    for at, word in enumerate(command.words):
        if word.text.endswith(".py") or (at and command.words[at - 1].text == "-m"):
            rest = Command(words=command.words[at:], line=command.line, env=command.env)
            return started(rest, around)
    if any(w.text.partition("=")[0] in _MEGATRON_FLAGS for w in command.words) or (
        command.line == 0 and first is None
    ):
        return Started(
            program=Word("", command.line),
            args=command.words,
            env=command.env,
            counts=around,
            line=command.line,
        )
    return first


def _looks_like_program(text: str) -> bool:
    return text.endswith((".py", ".sh")) or any(re.search(p, text) for p in _PROGRAMS.values())


def _overrides(candidate: Started) -> list[Override]:
    """Return the arguments that are settings by path; ``--a.b c`` and ``--a.b=c`` are, too."""
    found: list[Override] = []
    args = candidate.args
    for at, word in enumerate((candidate.program, *args)):
        if _TITAN_FLAG.fullmatch(word.text):
            found.append(_dotted_flag(word, args[at] if at < len(args) else None))
        elif word.text.startswith("--") and "=" in word.text:
            continue
        else:
            override = paths.from_word(word)
            if override is not None:
                found.append(override)
    return found


@dataclass(frozen=True, kw_only=True)
class _Nearby:
    """Where the programs of a script are found: texts at hand, else files of its folder."""

    folder: Path
    texts: Mapping[str, str]


def _beside(candidate: Started, nearby: _Nearby | None) -> list[Override]:
    """Return the settings of the Python program that stands beside a script, read as data."""
    name = candidate.program.text
    if nearby is None or not name.endswith(".py") or candidate.program.unknown:
        return []
    try:
        text = nearby.texts.get(name)
        if text is None:
            path = nearby.folder / name
            if len(name) > 255 or not path.is_file() or path.stat().st_size > MAX_BYTES:
                return []
            text = read_text(path)
        return paths.from_python(text, name.rpartition("/")[2])
    except (DocumentError, OSError, ValueError):
        return []


def _dotted_flag(word: Word, following: Word | None) -> Override:
    name, sign, value = word.text.removeprefix("--").partition("=")
    path = name.replace("-", "_")
    if sign:
        found = paths.from_word(Word(f"{path}={value}", word.line, word.variables, word.unknown))
        if found is not None:
            return found
    if following is None or following.text.startswith("--") or following.text == "":
        return Override(path, True, paths.origin_of(word, word.text))
    value = following.text if following.unknown else paths.value_of(following.text)
    return Override(path, value, paths.origin_of(following, word.text), following.unknown)


def _framework_of(program: str, args: Sequence[Word], found: Sequence[Override]) -> str:
    """Return the framework that program and settings point to.

    Raises ``LaunchError`` when none or several do, equally.
    """
    scores: dict[str, int] = dict.fromkeys(FRAMEWORKS, 0)
    for name, pattern in _PROGRAMS.items():
        scores[name] += 100 * bool(program and re.search(pattern, program))
    flags = [w.text.partition("=")[0] for w in args[:2000]]
    scores["megatron-lm"] += sum(f.replace("_", "-") in _MEGATRON_FLAGS for f in flags)
    scores["torchtitan"] += sum(2 for f in flags if _TITAN_FLAG.fullmatch(f))
    scores["megatron-bridge"] += 50 * ("--recipe" in flags)
    scores["nemo"] += 50 * ("--factory" in flags)
    for override in found[:2000]:
        for name, pattern in _PATHS.items():
            if re.match(pattern, override.path):
                scores[name] += 2
                break
    best = max(scores.values())
    names = [name for name in FRAMEWORKS if scores[name] == best]
    if best == 0 or len(names) > 1:
        rule = "The framework cannot be told from its content."
        if best:
            rule = f"It could be for {' or '.join(TITLES[n] for n in names)}."
        remedy = f"State --framework, one of {', '.join(FRAMEWORKS)}."
        raise LaunchError("framework", program or None, rule, remedy)
    return names[0]


def _read_overrides(
    framework: str,
    found: Sequence[Override],
    chosen: Started | None,
    gpus: int | None,
    environment: Mapping[str, str],
    env: Mapping[str, object] | None,
    unread: Sequence[str],
) -> Launch:
    module = import_module(f"meshwright.frameworks.{framework.replace('-', '_')}.read")
    texts: frozenset[str] = getattr(module, "texts", frozenset[str])()
    found = [_named(o) for o in resolved(found, environment)]
    known = [o for o in found if not o.unknown or o.path in texts]
    lost = [
        f"{o.origin}: {' '.join(o.unknown)} is not known"
        for o in found
        if o.unknown and o.path not in texts and _MATTERS.search(o.path)
    ]
    started_by = chosen.counts.total if chosen is not None else 0
    asked, known_env = gpus or started_by or None, {**environment, **(env or {})}
    if framework == "megatron-lm":
        reading: Reading = module.read_settings(known, asked, known_env)
    else:
        reading = module.read(known, chosen, asked, known_env)
    world = gpus or reading.gpus or started_by or None
    lost += _unknown_words(chosen)
    reading.findings[:0] = _without_value(framework, chosen)
    return _launch(framework, reading, world, environment, (*unread, *lost))


def _named(override: Override) -> Override:
    """Return a path to a model as known where only its folders are not: its name is its last part.

    ``$HOME/models/Qwen3-8B`` is a Qwen3-8B wherever it lies.
    """
    last = str(override.value).rpartition("/")[2]
    if not override.unknown or not last or re.search(r"[$`(){}]", last):
        return override
    return replace(override, unknown=()) if _MODEL_PATH.search(override.path) else override


_MODEL_PATH: Final = re.compile(r"(^|\.)model\.path$|^model_name_or_path$")


def _without_value(framework: str, chosen: Started | None) -> list[Finding]:
    """Return what is wrong with settings by path that stand without ``=`` and a value."""
    if chosen is None or framework not in _PATHS or framework == "torchtitan":
        return []
    return [
        Finding(
            id="unusable.override",
            severity="error",
            field=word.text,
            value=None,
            rule="A setting is path=value.",
            remedy=f"Write {word.text}= and its value.",
            message=f"{word.text}: A setting is path=value. Write {word.text}= and its value.",
        )
        for before, word in zip((Word("", 0), *chosen.args), chosen.args, strict=False)
        if _BARE_PATH.fullmatch(word.text)
        and re.match(_PATHS[framework], word.text.lstrip("+"))
        and not before.text.startswith("-")
    ]


_BARE_PATH: Final = re.compile(
    r"\+{0,2}[A-Za-z_]\w{0,80}(?:\.(?!(?:py|ya?ml|json|toml|sh|txt)$)\w{1,80}){1,12}"
)


def _unknown_words(chosen: Started | None) -> list[str]:
    """List the arguments that only a running shell knows: ``$@``, ``$EXTRA_ARGS``."""
    args = () if chosen is None else chosen.args
    return [
        f"line {word.line}: {word.text[:80]} is not known without running it"
        for before, word in zip((Word("", 0), *args), args, strict=False)
        if word.unknown and "=" not in word.text and not before.text.startswith("--")
    ]


def _launch(
    framework: str,
    reading: Reading,
    gpus: int | None,
    env: Mapping[str, str],
    unread: Sequence[str],
) -> Launch:
    _experts_of_name(reading)
    return Launch(
        framework=framework,
        settings=reading.settings,
        argv=tuple(reading.argv),
        gpus=gpus,
        gpus_per_node=reading.gpus_per_node,
        env=env,
        findings=tuple(reading.findings),
        unread=tuple(dict.fromkeys((*reading.unread, *unread))),
        assumed=tuple(reading.assumed),
    )


def _experts_of_name(reading: Reading) -> None:
    """Add the number of experts of a model that is only named: a layout depends on it."""
    name = reading.settings.get("model")
    if name is None or "num_layers" in reading.settings:
        return
    model = find_model(str(name.value))
    if model is not None and model.is_moe:
        reading.settings.setdefault(
            "num_moe_experts", Setting(value=model.num_experts, origin=f"model {model.name}")
        )


def _with_machine(launch: Launch, chosen: Started, script: Script) -> Launch:
    """Add the words as given, and what the batch options say of the machine."""
    per_node = chosen.counts.gpus_per_node or (
        chosen.counts.per_node if chosen.counts.torchrun else 0
    )
    asked = re.search(_GPU_KIND, " ".join(script.sbatch))
    return replace(
        launch,
        program=chosen.program.text,
        given=(*launch.given, *chosen.args),
        gpus_per_node=launch.gpus_per_node or per_node or None,
        gpu=asked[1] if asked else "",
    )


_GPU_KIND: Final = r"(?:gpu:|--gpus(?:-per-\w{1,8})?[= ]|-G ?)([A-Za-z][\w-]{1,40}):\d"
"""How Slurm is asked for a kind of GPU: ``--gres=gpu:h100:8``, ``--gpus-per-node=h100:8``."""

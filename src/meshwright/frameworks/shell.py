"""Reading shell scripts without running them: which commands they start, with which words.

Variables, defaults, quotes, line continuations, arrays, integer arithmetic, ``export``, functions
and simple conditions are followed. What only a running shell knows (the output of a command, a
sourced file, an argument of the script) is listed in ``Script.unread``. Loops are read once,
unknown conditions as true.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from meshwright.errors import DocumentError
from meshwright.frameworks.shell_functions import Function, function_at
from meshwright.frameworks.shell_numbers import condition, matches
from meshwright.frameworks.shell_words import (
    MAX_BYTES,
    NAME,
    OWN_ARGUMENTS,
    POSITIONAL,
    Token,
    Variables,
    Word,
    expand,
    expand_one,
    shifted,
    tokens,
)

__all__ = ["Command", "Script", "Word", "parse"]

MAX_NESTED: Final = 3
MAX_CALLS: Final = 8
CHARACTERS_A_TOKEN: Final = 256
"""What a token of a function costs of the budget each time that it is called."""
MOST_UNREAD: Final = 200
MOST_COMMANDS: Final = 20_000
MOST_BLOCKS: Final = 200
_ASSIGNMENT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,255})(\[[^]=]{0,64}\])?(\+?)=(.*)", re.S)
_DECLARING: Final = frozenset({"export", "declare", "local", "readonly", "typeset"})
_SEPARATORS: Final = frozenset({"\n", ";", "&", "&&", "||", "|", ";;", "(", ")"})
_REDIRECTIONS: Final = frozenset({"<", ">", ">>", "&>", ">&", "<&", "<<<"})
_SHELLS: Final = frozenset({"bash", "sh", "sbatch", "zsh"})


@dataclass(frozen=True, kw_only=True)
class Command:
    """One simple command: its words and the environment it is given by the script."""

    words: tuple[Word, ...]
    line: int
    env: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Script:
    """The commands of a script in order, its ``#SBATCH`` options, and what could not be read."""

    commands: tuple[Command, ...]
    sbatch: tuple[str, ...]
    env: Mapping[str, str]
    unread: tuple[str, ...]


def parse(text: str, known: Mapping[str, str] | None = None) -> Script:
    """Return the commands that the script would start.

    ``known`` are variables that are set before it begins. Nothing is run, and no file is opened.

    Raises ``DocumentError`` when the text is larger than any launch script.
    """
    if len(text) > MAX_BYTES:
        rule = f"A launch script has at most {MAX_BYTES} characters; this has {len(text)}."
        raise DocumentError("script", text[:40], rule, "Give the launch script itself.")
    variables = Variables()
    for name, value in {**_slurm_variables(text), **(known or {})}.items():
        variables.scalars[name] = Word(value, 0)
    variables.arrays[POSITIONAL] = [OWN_ARGUMENTS]
    reader = _Reader(variables)
    reader.read(tokens(text.replace("\x00", "")), 0)
    return Script(
        commands=tuple(reader.commands),
        sbatch=tuple(_sbatch_options(text)),
        env=reader.exported_now(),
        unread=tuple(reader.unread),
    )


def _sbatch_options(text: str) -> Iterable[str]:
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            yield from line.removeprefix("#SBATCH").partition(" #")[0].split()


_SLURM_WORDS: Final = {
    "--nodes": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    "-N": ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    "--ntasks-per-node": ("SLURM_NTASKS_PER_NODE",),
    "--gpus-per-node": ("SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE"),
    "--ntasks": ("SLURM_NTASKS", "SLURM_NPROCS"),
    "-n": ("SLURM_NTASKS", "SLURM_NPROCS"),
}


def _slurm_variables(text: str) -> dict[str, str]:
    """Return the variables that Slurm sets from the ``#SBATCH`` lines."""
    options = list(_sbatch_options(text))
    found: dict[str, str] = {}
    for number, option in enumerate(options):
        name, sign, value = option.partition("=")
        value = value if sign else "".join(options[number + 1 : number + 2])
        digits = value.rpartition(":")[2]
        if digits.isdecimal():
            found.update(dict.fromkeys(_SLURM_WORDS.get(name, ()), digits))
    nodes, tasks = found.get("SLURM_NNODES", ""), found.get("SLURM_NTASKS_PER_NODE", "")
    if len(nodes) + len(tasks) < 12 and nodes and tasks:
        found.setdefault("SLURM_NTASKS", str(int(nodes) * int(tasks)))
    return found


@dataclass
class _Frame:
    """An open ``if``, loop, ``case`` or brace; ``reads`` says whether its body counts."""

    kind: str
    reads: bool
    taken: bool = False
    subject: str | None = None
    wants_pattern: bool = False


@dataclass
class _Call:
    """A function that is being followed: its name, its environment, what ``local`` hides."""

    name: str
    env: Mapping[str, str]
    hidden: dict[str, tuple[Word | None, list[Word] | None]] = field(
        default_factory=dict[str, tuple[Word | None, list[Word] | None]]
    )


@dataclass
class _Reader:
    variables: Variables
    commands: list[Command] = field(default_factory=list[Command])
    unread: dict[str, None] = field(default_factory=dict[str, None])
    frames: list[_Frame] = field(default_factory=list[_Frame])
    exported: set[str] = field(default_factory=set[str])
    status: bool | None = True
    skip_next: bool = False
    nested: int = 0
    wrapper: tuple[Word, ...] = ()
    functions: dict[str, Function] = field(default_factory=dict[str, Function])
    calls: list[_Call] = field(default_factory=lambda: list[_Call]())
    _env: Mapping[str, str] | None = None

    def read(self, found: list[Token], nested: int) -> None:
        """Follow the commands in order."""
        self.nested = nested
        at = 0
        while at < len(found):
            at = self._statement(found, at)

    def _statement(self, found: list[Token], at: int) -> int:
        if len(self.frames) > MOST_BLOCKS or len(self.commands) > MOST_COMMANDS:
            rule = f"It has more than {MOST_COMMANDS} commands, or {MOST_BLOCKS} blocks in a block."
            raise DocumentError("script", "...", rule, "Give the launch script itself.")
        token = found[at]
        if token.kind == "document":
            return at + 1
        if token.kind == "operator":
            self._separator(token)
            return at + 1
        frame = self.frames[-1] if self.frames else None
        if frame is not None and frame.wants_pattern and token.text != "esac":
            return self._case_arm(found, at, frame)
        function = function_at(found, at)
        if function is not None:
            if self._reading:
                self.functions[function.name] = function
            return function.end
        if token.kind == "word" and token.text in _KEYWORDS:
            return self._keyword(found, at)
        return self._command(found, at)

    def _separator(self, token: Token) -> None:
        if token.text == "&&":
            self.skip_next = self.status is False
        elif token.text == "||":
            self.skip_next = self.status is not False
        elif token.text in ("\n", ";", ";;"):
            self.skip_next = False
        if token.text == ";;" and self.frames and self.frames[-1].kind == "case":
            self.frames[-1].wants_pattern = True
            self.frames[-1].reads = False

    @property
    def _reading(self) -> bool:
        return not self.skip_next and all(f.reads for f in self.frames)

    def _keyword(self, found: list[Token], at: int) -> int:
        word, line = found[at].text, found[at].line
        outer = all(f.reads for f in self.frames)
        frame = self.frames[-1] if self.frames else None
        if word in ("if", "while", "until"):
            self.frames.append(_Frame(word, outer))
        elif word in ("for", "select"):
            return self._for(found, at, outer)
        elif word == "case":
            return self._case(found, at, outer)
        elif word == "{":
            self.frames.append(_Frame("{", True))
        elif word in ("fi", "done", "esac", "}"):
            self._close(word)
        elif frame is not None and word in ("then", "do", "elif", "else"):
            self._branch(frame, word, line)
        return at + 1

    def _close(self, word: str) -> None:
        kinds = _CLOSED_BY[word]
        if self.frames and self.frames[-1].kind in kinds:
            self.frames.pop()

    def _branch(self, frame: _Frame, word: str, line: int) -> None:
        above = all(f.reads for f in self.frames[:-1])
        if word in ("then", "do"):
            known = self.status
            if frame.kind == "until" and known is not None:
                known = not known
            if known is None and above and frame.kind in ("if", "while", "until"):
                self._note(line, f"the condition of {frame.kind} is not known; read as true")
            frame.reads = above and known is not False and not frame.taken
            frame.taken = frame.taken or frame.reads
        elif word == "elif":
            frame.reads = above and not frame.taken
        else:
            frame.reads = above and not frame.taken
            frame.taken = True

    def _for(self, found: list[Token], at: int, outer: bool) -> int:
        """Read a loop with the first of its values."""
        line, name = found[at].line, ""
        end = at + 1
        words: list[str] = []
        while end < len(found) and found[end].text not in ("\n", ";", "do"):
            words.append(found[end].text)
            end += 1
        if len(words) > 2 and words[1] == "in" and NAME.fullmatch(words[0]):
            name = words[0]
            values = [w for raw in words[2:] for w in expand(raw, line, self.variables)]
            if values and outer:
                self.variables.scalars[name] = values[0]
            if len(values) > 1 and outer:
                self._note(line, f"the loop over {name} was read once, with {values[0].text}")
        self.frames.append(_Frame("for", outer))
        self.status = True
        return end

    def _case(self, found: list[Token], at: int, outer: bool) -> int:
        subject = None
        if at + 1 < len(found) and found[at + 1].kind == "word":
            word = expand_one(found[at + 1].text, found[at].line, self.variables)
            subject = None if word.unknown else word.text
        self.frames.append(_Frame("case", outer, subject=subject, wants_pattern=True))
        if subject is None and outer:
            self._note(found[at].line, "the subject of case is not known; no branch was read")
        end = at + 2
        return end + 1 if end < len(found) and found[end].text == "in" else end

    def _case_arm(self, found: list[Token], at: int, frame: _Frame) -> int:
        """Read the patterns up to the bracket, and whether their branch counts."""
        patterns: list[str] = []
        while at < len(found) and found[at].text != ")":
            if found[at].kind == "word":
                patterns.append(found[at].text.strip("'\""))
            elif found[at].text == "\n" and patterns:
                break
            at += 1
        above = all(f.reads for f in self.frames[:-1])
        hit = frame.subject is not None and any(matches(frame.subject, p) for p in patterns)
        frame.reads = above and hit and not frame.taken
        frame.taken = frame.taken or frame.reads
        frame.wants_pattern = False
        return at + 1

    def _command(self, found: list[Token], at: int) -> int:
        """Collect one simple command up to its separator and take it in."""
        start, parts, body = at, list[Token](), ""
        test = found[at].text == "[["
        while at < len(found):
            token = found[at]
            if test and token.text == "]]":
                test = False
            if token.kind == "operator" and token.text in _SEPARATORS and not test:
                break
            if token.kind == "operator" and token.text in _REDIRECTIONS and not test:
                at += 2
                continue
            if token.kind != "operator" or test:
                parts.append(token)
            at += 1
        following = at + 1
        while following < len(found) and found[following].kind == "document":
            body = found[following].text
            following += 1
        if self._reading and parts:
            self._take(parts, found[start].line, body)
        return max(at, start + 1)

    def _take(self, parts: list[Token], line: int, body: str) -> None:
        prefix: dict[str, str] = {}
        first = 0
        while first < len(parts) and self._is_assignment(parts[first]):
            first += 1
        if first == len(parts):
            for part in parts:
                self._assign(part)
            self.status = True
            return
        for part in parts[:first]:
            match = _ASSIGNMENT.fullmatch(part.text)
            if match is not None:
                prefix[match[1]] = expand_one(match[4], part.line, self.variables).text
        if parts[first].text in _DECLARING:
            self._declare(parts[first:])
            return
        words: list[Word] = []
        for part in parts[first:]:
            words += expand(part.text, part.line, self.variables)
        if words:
            self._run(words, line, prefix, body)

    def _is_assignment(self, part: Token) -> bool:
        return part.kind == "array" or _ASSIGNMENT.fullmatch(part.text) is not None

    def _declare(self, parts: list[Token]) -> None:
        exports = parts[0].text == "export" or any(p.text == "-x" for p in parts)
        for part in parts[1:]:
            if self.calls and parts[0].text != "export":
                self._hide(part)
            if self._is_assignment(part):
                self._assign(part)
            name = NAME.match(part.text)
            if exports and name is not None:
                self.exported.add(name.group())
                self._env = None
        self.status = True

    def _hide(self, part: Token) -> None:
        """Keep what a name stood for before the function that is being followed declared it."""
        name = NAME.match(part.text)
        if name is not None:
            before = self.variables.scalars.get(name[0]), self.variables.arrays.get(name[0])
            self.calls[-1].hidden.setdefault(name[0], before)

    def _assign(self, part: Token) -> None:
        variables = self.variables
        self._env = None
        if part.kind == "array":
            name = part.text.rstrip("+=")
            items: list[Word] = []
            for item in part.items:
                items += expand(item.text, item.line, variables)
            named = [replace(w, variables=(name, *w.variables)[:8]) for w in items]
            before = variables.arrays.get(name, []) if part.text.endswith("+=") else []
            variables.spend(len(before))
            variables.arrays[name] = [*before, *named]
            return
        match = _ASSIGNMENT.fullmatch(part.text)
        if match is None or match[2]:
            return
        name, more = match[1], match[3]
        value = expand_one(match[4], part.line, variables)
        before = variables.scalars.get(name)
        if more and before is not None:
            variables.spend(len(before.text))
            unknown = (*before.unknown, *value.unknown)[:8]
            value = replace(value, text=before.text + value.text, unknown=unknown)
        variables.scalars[name] = replace(value, variables=value.variables[:8])
        variables.arrays.pop(name, None)

    def _run(self, words: list[Word], line: int, prefix: dict[str, str], body: str) -> None:
        name = words[0].text.rpartition("/")[2]
        if name in ("[", "[[", "test"):
            known = not any(w.unknown for w in words)
            self.status = condition([w.text for w in words]) if known else None
            return
        self.status = None if name in ("grep", "command", "which", "false") else True
        if name in ("source", ".") and len(words) > 1:
            self._note(line, f"{words[1].text} is sourced and was not read")
        elif name == "unset":
            for word in words[1:]:
                self.variables.scalars.pop(word.text, None)
                self._env = None
        elif name == "eval":
            self._evaluate(words[1:], line)
        elif name == "shift" or (name == "set" and [w.text for w in words[1:2]] == ["--"]):
            self._set_parameters(name, words[1:])
        elif words[0].text in self.functions:
            self._call(words, line, prefix)
        else:
            at, text = _given_script(words, body)
            if text and self.nested < MAX_NESTED:
                self._nest(text, words[:at], line + bool(body))
            else:
                around = {**self._around(), **prefix}
                env = {**self.exported_now(), **around} if around else self.exported_now()
                all_words = (*self.wrapper, *words)
                self.commands.append(Command(words=all_words, line=line, env=env))

    def _set_parameters(self, name: str, words: list[Word]) -> None:
        parameters = words[1:]
        if name == "shift":
            by = words[0].text if words else "1"
            number = int(by) if by.isdecimal() and len(by) < 6 else 0
            parameters = shifted(self.variables.arrays[POSITIONAL], number)
        self.variables.arrays[POSITIONAL] = parameters

    def _call(self, words: list[Word], line: int, prefix: Mapping[str, str]) -> None:
        """Read the body of a function with the words of the call as its parameters."""
        function = self.functions[words[0].text]
        if len(self.calls) >= MAX_CALLS or any(c.name == function.name for c in self.calls):
            self._note(line, f"the function {function.name} calls itself; not followed")
            return
        variables, frames = self.variables, self.frames
        variables.spend(CHARACTERS_A_TOKEN * len(function.body))
        outer = variables.arrays[POSITIONAL]
        call = _Call(function.name, {**self._around(), **prefix})
        self.frames, variables.arrays[POSITIONAL] = [], words[1:]
        self.calls.append(call)
        self.read(function.body, self.nested)
        self.calls.pop()
        self.frames, variables.arrays[POSITIONAL] = frames, outer
        self.skip_next, self._env = False, None
        for name, (scalar, array) in call.hidden.items():
            _restore(variables.scalars, name, scalar)
            _restore(variables.arrays, name, array)

    def _around(self) -> Mapping[str, str]:
        """Return the environment before the call of the function that is being followed."""
        return self.calls[-1].env if self.calls else dict[str, str]()

    def _evaluate(self, words: list[Word], line: int) -> None:
        """Read the words of ``eval`` as the command line that they spell, when it is known."""
        if not words or words[0].text[:1] in ("$", "`") or self.nested >= MAX_NESTED:
            self._note(line, "eval was not followed")
            return
        self._nest(" ".join(w.text for w in words), [], line)

    def _nest(self, text: str, wrapper: list[Word], line: int) -> None:
        """Read the script that a shell is given as an argument or as a here-document.

        The words before the shell (``srun --ntasks-per-node=1``) start each of its commands.
        """
        frames, nested, outer = self.frames, self.nested, self.wrapper
        self.frames, self.wrapper = [], (*outer, *wrapper)
        self.variables.spend(len(text))
        self.read(tokens(text, line), nested + 1)
        self.frames, self.nested, self.wrapper = frames, nested, outer

    def exported_now(self) -> Mapping[str, str]:
        """Return the exported variables whose values are known."""
        if self._env is None:
            self.variables.spend(len(self.exported))
            found = {name: self.variables[name] for name in sorted(self.exported)}
            self._env = {n: w.text for n, w in found.items() if w is not None and not w.unknown}
        return self._env

    def _note(self, line: int, text: str) -> None:
        if len(self.unread) < MOST_UNREAD:
            self.unread[f"line {line}: {text}"] = None


_KEYWORDS: Final = frozenset(
    {
        "if",
        "then",
        "elif",
        "else",
        "fi",
        "for",
        "select",
        "while",
        "until",
        "do",
        "done",
        "case",
        "esac",
        "{",
        "}",
    }
)
_CLOSED_BY: Final = {
    "fi": ("if",),
    "done": ("for", "while", "until"),
    "esac": ("case",),
    "}": ("{",),
}


T = TypeVar("T")


def _restore(known: dict[str, T], name: str, before: T | None) -> None:
    known.pop(name, None)
    if before is not None:
        known[name] = before


def _given_script(words: list[Word], body: str) -> tuple[int, str]:
    """Return where a shell stands among the words, and the script that it is given, if any."""
    texts = [w.text for w in words]
    if body and texts[0].rpartition("/")[2] in _SHELLS:
        return 0, body
    for at, text in enumerate(texts[:-2]):
        if text.rpartition("/")[2] in _SHELLS and re.fullmatch(r"-[a-z]{0,4}c", texts[at + 1]):
            return at, " ".join(texts[at + 2 :])
    return 0, ""

"""Settings written as paths: ``a.b.c=value`` on a command line, YAML, TOML, or Python assignments.

Values are read as data: YAML by its safe loader, Python by its syntax tree. Nothing is executed.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from meshwright.errors import DocumentError
from meshwright.frameworks.shell import Word

MOST_OVERRIDES: Final = 20_000
MAX_DEPTH: Final = 40
_PATH: Final = re.compile(r"([+~]{0,2})([A-Za-z_][\w]*(?:[./@][\w-]+)*)=(.*)", re.DOTALL)
_INTEGER: Final = re.compile(r"[+-]?\d{1,18}")
_FLOAT: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")


@dataclass(frozen=True, slots=True)
class Override:
    """One setting: its dotted path, its value, where it stands, and what of it is not known."""

    path: str
    value: Any
    origin: str
    unknown: tuple[str, ...] = ()
    prefix: str = ""


def from_word(word: Word) -> Override | None:
    """Return the override that a word of a command line is, or None when it is none."""
    match = _PATH.fullmatch(word.text) if len(word.text) < 65_536 else None
    if match is None:
        return None
    prefix, path, text = match.groups()
    unknown = word.unknown if any(u.strip("${}`()") in text for u in word.unknown) else ()
    value = text if unknown else value_of(text)
    return Override(path.replace("/", "."), value, origin_of(word, path), unknown, prefix)


def origin_of(word: Word, name: str) -> str:
    """Return where a word stands, and the variables it was read through."""
    through = ", ".join(v for v in word.variables[:4])
    place = f"line {word.line}" if word.line else "command line"
    return f"{name}, {place}" + (f", through {through}" if through else "")


def value_of(text: str) -> Any:
    """Read a value as Hydra does: numbers, true/false, null, lists, quoted and plain text."""
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("null", "none", "~", ""):
        return None
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text[0] in "[(" and text[-1] in "])":
        return _list_of(text)
    return text


def _list_of(text: str) -> Any:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        inner = text[1:-1].strip()
        if any(c in inner for c in "[({"):
            return text
        return [value_of(item) for item in inner.split(",")] if inner else []
    return cast("list[Any]", found) if isinstance(found, list) else text


def flatten(document: object, origin: str) -> list[Override]:
    """Return the leaves of a nested document, in order, as overrides.

    Raises ``DocumentError`` when it is deeper or larger than any configuration.
    """
    found: list[Override] = []
    stack: list[tuple[str, object, int]] = [("", document, 0)]
    while stack:
        path, value, depth = stack.pop()
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            items = list(cast("Mapping[Any, Any]", value).items())
            stack += [(f"{path}.{k}" if path else str(k), v, depth + 1) for k, v in items[::-1]]
        else:
            found.append(Override(path, value, f"{path}, {origin}"))
        if len(found) + len(stack) > MOST_OVERRIDES:
            rule = f"It holds more than {MOST_OVERRIDES} settings."
            raise DocumentError("document", origin, rule, "Give the launch configuration itself.")
    return found


def from_yaml(text: str, origin: str) -> list[Override]:
    """Return the settings of a YAML (or JSON) document. Raises ``DocumentError``."""
    import yaml  # a tenth of a second that only YAML pays

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    _refuse_aliases(text, origin)
    try:
        if _may_be_deep(text):
            _refuse_depth(loader(text), origin)
        found = yaml.load(text, Loader=loader)  # a safe loader: it makes plain data only
    except DocumentError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        first = str(error).partition("\n")[0][:200]
        raise DocumentError("document", origin, f"It is not valid YAML: {first}.", "") from None
    if not isinstance(found, dict):
        raise DocumentError("document", origin, "It holds no settings.", "Write key: value.")
    return flatten(cast("dict[str, Any]", found), origin)


def _refuse_aliases(text: str, origin: str) -> None:
    """Refuse documents whose aliases multiply: a few hundred bytes can stand for gigabytes."""
    if len(re.findall(r"(?m)[\s\[,:]\*[\w-]+", text)) > 30:
        rule = "It has more than 30 aliases."
        raise DocumentError("document", origin, rule, "Write the values out.")


MOST_LEVELS: Final = 200


def _may_be_deep(text: str) -> bool:
    """Say whether blocks could lie deeper than ``MOST_LEVELS`` in far fewer lines."""
    openings = text.count("[") + text.count("{")
    return openings > MOST_LEVELS or re.search(r"(?:[-?][ \t]+){100}", text) is not None


def _refuse_depth(reader: Any, origin: str) -> None:
    """Refuse deep documents before they are composed: composing them overflows the stack."""
    depth = 0
    while reader.check_event():
        kind = type(reader.get_event()).__name__
        depth += kind in ("SequenceStartEvent", "MappingStartEvent")
        depth -= kind in ("SequenceEndEvent", "MappingEndEvent")
        if depth > MOST_LEVELS:
            rule = f"It has more than {MOST_LEVELS} blocks in a block."
            raise DocumentError("document", origin, rule, "Give the launch configuration itself.")


def from_toml(text: str, origin: str) -> list[Override]:
    """Return the settings of a TOML document. Raises ``DocumentError``."""
    return flatten(load_toml(text, origin), origin)


def load_toml(text: str, origin: str) -> dict[str, Any]:
    """Return a TOML document as data. Raises ``DocumentError``.

    Keys of very many parts are refused: their tables take a time that grows with the square.
    """
    import tomllib

    if any(line.count(".") > 2 * MOST_LEVELS for line in text.splitlines()):
        rule = f"A line has more than {2 * MOST_LEVELS} dots."
        raise DocumentError("document", origin, rule, "Give the launch configuration itself.")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise DocumentError("document", origin, f"It is not valid TOML: {error}.", "") from None


def from_python(text: str, origin: str) -> list[Override]:
    """Return what Python code assigns or passes by keyword, as far as it is written as data.

    ``recipe.trainer.strategy.tensor_model_parallel_size = 4`` gives that path without its first
    name; ``MegatronStrategy(tensor_model_parallel_size=4)`` gives
    ``MegatronStrategy.tensor_model_parallel_size``. Names that were assigned a constant are
    replaced by it. Raises ``DocumentError`` when it is not Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DocumentError("document", origin, f"It is not valid Python: {error}.", "") from None
    constants: dict[str, Any] = {}
    found: list[Override] = []
    for node in _in_order(tree):
        found += _of_node(node, constants, origin)
        if len(found) > MOST_OVERRIDES:
            rule = f"It holds more than {MOST_OVERRIDES} settings."
            raise DocumentError("document", origin, rule, "Give the launch configuration itself.")
    return found


def _in_order(tree: ast.AST) -> Iterator[ast.AST]:
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        stack += list(ast.iter_child_nodes(node))[::-1]


def _of_node(node: ast.AST, constants: dict[str, Any], origin: str) -> Iterable[Override]:
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        value, known = _constant(node.value, constants)
        target = node.targets[0]
        if isinstance(target, ast.Name) and known:
            constants[target.id] = value
        path = _dotted(target)
        if path.count(".") >= 1:
            yield _override(path.partition(".")[2], node.value, constants, node, origin)
    elif isinstance(node, ast.Call):
        yield from _recipe(node, origin)
        name = _callee(node)
        for keyword in node.keywords:
            if keyword.arg is not None and name:
                path = f"{name}.{keyword.arg}"
                yield _override(path, keyword.value, constants, keyword, origin)


def _recipe(node: ast.Call, origin: str) -> Iterable[Override]:
    """Return the recipe that a call takes: ``llm.llama3_8b.pretrain_recipe(...)``."""
    name = _dotted(node.func)
    parts = name.split(".")
    where = f"{name}, {origin} line {node.lineno}"
    if parts[-1] in ("pretrain_recipe", "finetune_recipe") and len(parts) > 1:
        yield Override("recipe", f"{parts[-2]}_{parts[-1].removesuffix('_recipe')}", where)
    elif parts[-1] == "finetune":
        yield Override("finetune", True, where)
    elif re.fullmatch(r"\w{3,80}_(pretrain|sft|peft|finetune)_config", parts[-1]):
        yield Override("recipe", parts[-1], where)


def _override(
    path: str, value: ast.expr, constants: Mapping[str, Any], node: Any, origin: str
) -> Override:
    found, known = _constant(value, constants)
    where = f"{path}, {origin} line {node.lineno}"
    return Override(path, found, where, () if known else ("an expression",))


def _callee(node: ast.Call) -> str:
    """Return the class that a call makes, also inside ``run.Config(Class, ...)``."""
    name = _dotted(node.func)
    last = name.rpartition(".")[2]
    if last in ("Config", "Partial") and node.args:
        return _dotted(node.args[0]).rpartition(".")[2]
    return last


def _dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *parts[::-1]])


def _constant(node: ast.expr, constants: Mapping[str, Any], depth: int = 0) -> tuple[Any, bool]:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return node.value, True
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id], True
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and depth < MAX_DEPTH:
        value, known = _constant(node.operand, constants, depth + 1)
        return (-value, True) if known and isinstance(value, int | float) else (None, False)
    if isinstance(node, ast.List | ast.Tuple) and depth < MAX_DEPTH:
        items = [_constant(item, constants, depth + 1) for item in node.elts[:1000]]
        return [value for value, _ in items], all(known for _, known in items)
    if isinstance(node, ast.Attribute) and _dotted(node).startswith("torch."):
        return _dotted(node), True
    return None, False


def by_path(overrides: Sequence[Override]) -> dict[str, Override]:
    """Return the overrides by path; the last one counts, as in Hydra."""
    return {o.path: o for o in overrides if not o.prefix.startswith("~")}

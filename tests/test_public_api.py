"""What the package shows, what it imports, and that everything found by name is documented."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import meshwright
from meshwright import api, registry
from meshwright.checks import all_checks
from meshwright.cost.explain import TERMS
from meshwright.units import unit_of

REGISTRIES = [
    "meshwright.describe.families",
    "meshwright.parallel.schedules",
    "meshwright.checks",
]


def test_all_is_sorted_and_every_name_in_it_exists() -> None:
    assert sorted(meshwright.__all__) == meshwright.__all__
    assert dir(meshwright) == meshwright.__all__
    for name in meshwright.__all__:
        assert getattr(meshwright, name) is not None


def test_nothing_but_all_is_public() -> None:
    code = (
        "import json, meshwright as m; [getattr(m, n) for n in m.__all__];"
        "print(json.dumps([n for n, v in vars(m).items() if not n.startswith('_')]))"
    )
    shown = set(json.loads(output_of(code)))
    # Modules of the package appear in it once something has imported them.
    modules = {p.stem for p in Path(meshwright.__file__).parent.iterdir()}
    assert shown - modules - {"annotations", "import_module", "TYPE_CHECKING", "Any"} <= set(
        meshwright.__all__
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        meshwright.nonsense  # noqa: B018  (the access itself must raise)


@pytest.mark.parametrize("name", sorted(set(meshwright.__all__) - {"__version__"}))
def test_every_public_name_is_documented_and_typed(name: str) -> None:
    one = getattr(meshwright, name)
    assert inspect.getdoc(one)
    if inspect.isfunction(one):
        hints = inspect.signature(one)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not p.empty for p in hints.parameters.values())


def test_the_names_that_others_rely_on_take_their_arguments() -> None:
    promised = {
        "rank_groups": ["gpus", "tp", "cp", "pp", "ep", "etp", "order", "hierarchical_cp", "vpp"],
        "place_layers": [
            *("num_layers", "pp", "vpp", "first", "last", "account_for_embedding"),
            *("account_for_loss", "layout", "mtp", "layers_per_vpp"),
        ],
        "schedule_order": ["pp", "num_microbatches", "vpp", "name", "microbatch_group_size"],
        "check_launch": ["argv", "gpus", "framework", "env"],
        "parameters": ["config"],
    }
    for name, arguments in promised.items():
        assert list(inspect.signature(getattr(meshwright, name)).parameters) == arguments


def test_every_verb_says_what_it_does_and_what_it_raises() -> None:
    for name in api.__all__:
        verb = getattr(api, name)
        assert inspect.getdoc(verb), name
        assert getattr(verb, "__module__", "").startswith("meshwright"), name


def modules_found() -> list[ModuleType]:
    return [
        import_module(f"{package}.{name}")
        for package in REGISTRIES
        for name in registry.names(package)
    ]


@pytest.mark.parametrize("module", modules_found(), ids=lambda m: m.__name__)
def test_every_module_that_is_found_by_its_name_is_documented(module: ModuleType) -> None:
    assert (module.__doc__ or "").strip()
    for name, one in vars(module).items():
        if inspect.isfunction(one) and one.__module__ == module.__name__ and name[0] != "_":
            assert inspect.getdoc(one), f"{module.__name__}.{name}"


@pytest.mark.parametrize("check", all_checks(), ids=lambda c: f"{c.topic}.{c.name}")
def test_every_rule_states_itself_and_its_remedy(check: object) -> None:
    for part in ("id", "field", "rule", "remedy"):
        assert getattr(check, part)


@pytest.mark.parametrize("term", [t for t in TERMS if t != "mfu_fraction"])
def test_every_term_carries_its_unit_in_its_name(term: str) -> None:
    assert unit_of(term) in ("s", "bytes")


def output_of(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ["numpy", "torch", "scipy", "pandas", "matplotlib", "yaml", "jinja2", "meshwright.cost"]


def heavy_modules_of(*words: str) -> set[str]:
    """Return which heavy modules a command has imported when it ends."""
    code = (
        "import sys, io, contextlib\n"
        f"sys.argv = ['meshwright', *{list(words)!r}]\n"
        "from meshwright.__main__ import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        assert end.code in (0, None), end.code\n"
        f"print(*(m for m in {HEAVY!r} if m in sys.modules))\n"
    )
    return set(output_of(code).split())


def test_help_and_version_import_nothing_heavy() -> None:
    assert heavy_modules_of("--help") == set()
    assert heavy_modules_of("--version") == set()
    assert heavy_modules_of("plan", "--help") == set()


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, meshwright; print(*(m for m in {HEAVY!r} if m in sys.modules))"
    assert output_of(code).split() == []


def test_planning_works_without_torch() -> None:
    batch = ("--seq-len", "4096", "--global-batch-size", "64")
    used = heavy_modules_of("plan", "llama3-8b", "8xH100", *batch, "--fix", "pp=1")
    assert "torch" not in used
    assert not used & {"scipy", "pandas", "matplotlib", "jinja2"}
    assert "torch" not in heavy_modules_of("list", "models")
    assert "torch" not in heavy_modules_of("ranks", "--gpus", "8")

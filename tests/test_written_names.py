"""Every name that a written launch holds is one that its framework has."""

from __future__ import annotations

import ast
import csv
import gzip
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from meshwright.describe.job import Execution, Job, job
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.errors import MeshwrightError
from meshwright.frameworks.check import check
from meshwright.frameworks.launch import FRAMEWORKS
from meshwright.frameworks.megatron_bridge.settings import settings as bridge_settings
from meshwright.frameworks.megatron_bridge.write import TRAINING as BRIDGE
from meshwright.frameworks.megatron_lm.arguments import arguments
from meshwright.frameworks.nemo.read import CLASSES
from meshwright.frameworks.nemo.write import TRAINING as NEMO
from meshwright.frameworks.skyrl.write import TRAINING as SKYRL
from meshwright.frameworks.torchtitan.write import TRAINING as TITAN
from meshwright.frameworks.verl.write import TRAINING as VERL
from meshwright.frameworks.write import launch_files
from meshwright.parallel.layout import Layout, from_text

DATA = Path(__file__).parent / "data"
COLUMNS = {
    "megatron-lm": "megatron_lm_cli",
    "megatron-bridge": "megatron_bridge",
    "nemo": "nemo2",
    "skyrl": "skyrl_sft",
    "verl": "verl",
    "torchtitan": "torchtitan",
}
CORE = {
    "nemo": "model.config.",
    "skyrl": "megatron_config.transformer_config_kwargs.",
    "verl": "actor_rollout_ref.actor.megatron.override_transformer_config.",
}
"""Where a framework hands fields to Megatron Core's configuration as they are."""
PATH = re.compile(r"[A-Za-z_][\w]*(?:\.[\w]+)*")


@cache
def surfaces(framework: str) -> frozenset[str]:
    with gzip.open(DATA / "surfaces.csv.gz", "rt") as file:
        cells = " ".join(row[COLUMNS[framework]] for row in csv.DictReader(file))
    pattern = re.compile(r"--[\w-]+") if framework == "megatron-lm" else PATH
    return frozenset(pattern.findall(cells))


@cache
def accepted(framework: str) -> frozenset[str]:
    """Return the names of launches that the framework itself took."""
    path = DATA / f"{framework.replace('-', '_')}_validation.jsonl.gz"
    if not path.exists():
        return frozenset()
    found: set[str] = set()
    with gzip.open(path, "rt") as file:
        for row in map(json.loads, file):
            words: Any = row.get("argv") or row.get("overrides") or []
            if row["accepted"]:
                found |= {str(word).partition("=")[0].lstrip("+") for word in words}
    return frozenset(found)


@cache
def documented(framework: str) -> frozenset[str]:
    with (DATA / "documented_names.csv").open() as file:
        return frozenset(r["name"] for r in csv.DictReader(file) if r["framework"] == framework)


def is_known(framework: str, name: str) -> bool:
    known = surfaces(framework) | accepted(framework) | documented(framework)
    if name in known:
        return True
    head = CORE.get(framework, "\n")
    field = name.removeprefix(head)
    bridge = surfaces("megatron-bridge") | accepted("megatron-bridge")
    bridge |= documented("megatron-bridge")
    return field != name and f"model.{field}" in bridge


def names(framework: str, files: dict[str, str]) -> set[str]:
    """Return the names of settings in written files, as the table of surfaces spells them."""
    if framework == "nemo":
        (script,) = (text for name, text in files.items() if name.endswith(".py"))
        return {name for node in ast.walk(ast.parse(script)) for name in keywords(node)}
    arrays = re.findall(r"(?ms)^[A-Z_]+=\($(.*?)^\)", next(iter(files.values())))
    words = " ".join(arrays).split()
    if framework == "megatron-lm":
        return {word for word in words if word.startswith("--")}
    heads = {word.partition("=")[0].lstrip("+-'\"") for word in words if "." in word or "=" in word}
    return {head.replace(".no_", ".") for head in heads if PATH.fullmatch(head)}


def keywords(node: ast.AST) -> list[str]:
    """Return the keywords of a call as paths, and what is called."""
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    last = called.rpartition(".")[2]
    head = {**CLASSES, "GPTConfig": "model.config"}.get(last, last)
    if called.startswith("os."):
        return []
    return [called, *(f"{head}.{keyword.arg}" for keyword in node.keywords)]


LAYOUTS = (
    "tp=2 pp=4 vpp=2 cp=2 sp=true microbatch_group_size=4",
    "tp=1 pp=2 cp=1 zero=no_shard recompute=full",
    "tp=2 cp=4 sp=true cp_comm=a2a+p2p hierarchical_cp=2x2 dp_replicate=2",
    "tp=4 sp=true zero=optim_grads_params recompute=core_attn+mlp",
    "tp=2 pp=4 sp=true account_for_embedding=true account_for_loss=true order=tp-cp-ep-pp-dp",
    "tp=1 cp=2 zero=optim_grads_params cp_comm=all_gather",
    "pp=4 first=7 last=7 zero=optim",
    "pp=2 pipeline_layout=E{half}|{half}L zero=optim",
)
EXECUTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap_tp_comm": False, "overlap_grad_reduce": False, "overlap_param_gather": False},
    {"cuda_graphs": "full"},
    {"cuda_graphs": "partial", "graphed_modules": frozenset({"attn"})},
    {"optimizer_offload_fraction": 0.5, "flash_attention": False, "fused_softmax": False},
    {"offloaded_modules": frozenset({"core_attn"}), "fused_cross_entropy": False},
    {"overlap_ep_comm": True, "delay_weight_grad": True, "dispatcher": "deepep"},
    {"dispatcher": "hybridep", "capacity_factor": 1.5, "shared_expert_overlap": True},
    {"activation_offload_layers": 2, "fused_permute": False, "fused_experts": True},
)
PRECISIONS = ("bf16", "fp16", "fp8", "fp8-mx", "nvfp4", "fp32")


def launches(framework: str) -> Iterator[dict[str, str]]:
    """Write every choice that a plan can make, for a model of every kind."""
    for name in ("llama3-8b", "mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "qwen3-8b"):
        model = load_model(name)
        half = "t" * (model.num_layers // 2)
        experts = " ep=8 etp=1" if model.is_moe else ""
        for text, execution in itertools.product(LAYOUTS, EXECUTIONS):
            x = from_text(text.format(half=half) + experts, 64)
            wanted = replace(job(seq_len=4096, gbs=256), execution=Execution(**execution))
            yield from written(framework, model, wanted, x)
        x = from_text("tp=2 sp=true" + experts, 64)
        for precision, task in itertools.product(PRECISIONS, ("pretrain", "sft", "lora")):
            wanted = job(seq_len=4096, gbs=256, precision_name=precision, task=task)
            yield from written(framework, model, wanted, x)


def written(framework: str, model: Model, wanted: Job, x: Layout[int]) -> Iterator[dict[str, str]]:
    with suppress(MeshwrightError):
        yield launch_files(model, None, wanted, x, framework)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_name_that_is_written_is_listed(framework: str) -> None:
    """Spec: the table of surfaces, accepted launches, or documentation named in one place."""
    found = set[str]()
    for files in launches(framework):
        found |= names(framework, files)
    assert len(found) > 15
    assert {name for name in found if not is_known(framework, name)} == set()


@pytest.mark.parametrize(
    ("framework", "training"),
    [("nemo", NEMO), ("skyrl", SKYRL), ("verl", VERL), ("torchtitan", TITAN)],
)
def test_every_setting_that_is_carried_has_a_listed_name(
    framework: str, training: dict[str, str]
) -> None:
    paths = {path.lstrip("+") for path in training.values()}
    assert {path for path in paths if not is_known(framework, path)} == set()


def test_settings_of_bridge_are_paths_of_its_configuration() -> None:
    assert set(BRIDGE.values()) <= bridge_settings().keys()


def test_tables_of_flags_and_paths_hold_every_surface() -> None:
    """Spec: what the table of surfaces names can be read, and so be carried."""
    missing = {flag for flag in surfaces("megatron-lm") if flag not in arguments()}
    assert missing == set()
    sections = {path.partition(".")[0] for path in bridge_settings()}
    paths = {p for p in surfaces("megatron-bridge") if p.partition(".")[0] in sections and "." in p}
    latent = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    # A GPT of Bridge has no such fields: its recipes of such models hold another provider.
    assert paths - bridge_settings().keys() == {f"model.{name}" for name in latent}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_name_is_documented_that_a_list_has(framework: str) -> None:
    assert documented(framework) & (surfaces(framework) | accepted(framework)) == set()


@pytest.mark.parametrize("framework", ["nemo", "skyrl", "verl", "torchtitan"])
def test_no_name_of_a_framework_is_taken_for_a_misspelt_one(framework: str) -> None:
    """Oracle: the names of each framework's own surface."""
    names = sorted(n for n in surfaces(framework) | documented(framework) if "." in n)
    head = "--" if framework == "torchtitan" else ""
    result = check([f"{head}{name}=1" for name in names], framework=framework, gpus=8)
    assert [f.field for f in result.findings if f.id == "unknown_name"] == []
    for name in names:
        result = check([f"{head}{name}=1"], framework=framework, gpus=8)
        assert [f.field for f in result.findings if f.id == "unknown_name"] == []

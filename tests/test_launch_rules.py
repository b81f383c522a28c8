"""Launches judged as the frameworks judge them; the truth is their own answers (oracles)."""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright as mw
from meshwright.frameworks import resolve
from meshwright.frameworks.megatron_bridge.launch import rules as bridge_rules
from meshwright.frameworks.megatron_bridge.settings import setting_of
from meshwright.frameworks.megatron_bridge.settings import settings as bridge_settings
from meshwright.frameworks.megatron_lm.arguments import (
    UnusableArgument,
    arguments,
    by_name,
    parse,
    pattern,
)
from meshwright.frameworks.megatron_lm.launch import Resolved
from meshwright.frameworks.megatron_lm.launch import rules as megatron_rules
from meshwright.parallel.layout import minimum_world_size
from oracles import rows

MEGATRON_LM = rows("megatron_lm_validation.jsonl.gz")
BRIDGE = rows("megatron_bridge_validation.jsonl.gz")


def flags(text: str) -> list[str]:
    return text.split()


SMALL = flags(
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 "
    "--max-position-embeddings 1024 --micro-batch-size 1 --bf16"
)
SMALL_BRIDGE = [
    "model.num_layers=8",
    "model.hidden_size=1024",
    "model.num_attention_heads=16",
    "model.seq_length=1024",
    "dataset.seq_length=1024",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
]
ONE_CONNECTION = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def overrides(row: dict[str, Any]) -> list[str]:
    return [
        f"{path}={value}" if isinstance(value, str) else f"{path}={json.dumps(value)}"
        for path, value in row["overrides"].items()
    ]


def environment(row: dict[str, Any]) -> dict[str, Any]:
    return row["env"] | {f"site.{name}": value for name, value in row.get("site", {}).items()}


@cache
def resolved() -> dict[str, Resolved]:
    """Every launch of the two oracles, resolved once."""
    made: dict[str, Resolved] = {}
    for row in MEGATRON_LM:
        made[row["id"]] = resolve(row["argv"], row["world_size"], env=environment(row))
    for row in BRIDGE:
        world = row["world_size"]
        made[row["id"]] = resolve(overrides(row), world, "megatron-bridge", row["env"])
    return made


def first_error(launch: Resolved) -> str | None:
    errors = [f.id for f in launch.findings if f.severity == "error"]
    return errors[0] if errors else None


def errors_of(
    argv: list[str], gpus: int = 8, framework: str = "megatron-lm", **env: Any
) -> set[str]:
    found = mw.check_launch(argv, gpus, framework, ONE_CONNECTION | env)
    return {f.id for f in found if f.severity == "error"}


# --- the frameworks' own answers ---


@pytest.mark.parametrize("oracle", [MEGATRON_LM, BRIDGE], ids=["megatron-lm", "megatron-bridge"])
def test_every_launch_is_accepted_or_refused_as_the_framework_does(
    oracle: list[dict[str, Any]],
) -> None:
    wrong = [r["id"] for r in oracle if resolved()[r["id"]].accepted != r["accepted"]]
    assert wrong == []


@pytest.mark.parametrize("oracle", [MEGATRON_LM, BRIDGE], ids=["megatron-lm", "megatron-bridge"])
def test_the_first_error_is_the_rule_at_which_the_framework_stops(
    oracle: list[dict[str, Any]],
) -> None:
    wrong = {
        r["id"]: (first_error(resolved()[r["id"]]), r["rule_id"])
        for r in oracle
        if first_error(resolved()[r["id"]]) != r["rule_id"]
    }
    assert wrong == {}


def test_megatron_lm_ends_up_with_the_values_that_are_resolved_here() -> None:
    not_kept = {"changed", "derived", "layers_total", "layers_cover_once", "module_build"}
    for row in (r for r in MEGATRON_LM if r["accepted"]):
        launch, truth = resolved()[row["id"]], row["resolved"]
        expected = {k: v for k, v in truth.items() if k not in not_kept} | truth["derived"]
        assert {k: launch.values[k] for k in expected} == expected, row["id"]
        changed = {k: list(launch.changes.get(k, ())) for k in truth["changed"]}
        assert changed == truth["changed"], row["id"]


def test_bridge_ends_up_with_the_values_that_are_resolved_here() -> None:
    for row in (r for r in BRIDGE if r["accepted"]):
        launch, truth = resolved()[row["id"]], row["resolved"]
        expected = {k: v for k, v in truth.items() if k not in ("changed", "layers_cover_once")}
        assert {k: launch.values[k] for k in expected} == expected, row["id"]
        changed = {k: list(launch.changes.get(setting_of(k), ())) for k in truth["changed"]}
        assert changed == truth["changed"], row["id"]


WARNINGS = {
    "Setting args.check_for_nan": "MLM-ARG-fp16_nan",
    "Using a large number of experts": "MLM-TC-router_dtype",
    "If you are using transformer_engine as the transformer implementation": "MLM-TC-rc_core_warn",
    "te_rng_tracker is not enabled": "MLM-ARG-graph_rng",
    "Verify that fused gradient accumulation": "MLM-ARG-mfsdp_gaf",
    "Disabling sequence parallelism": "MLM-ARG-sp_tp1",
    "mxfp8 without using": "MLM-OPT-mxfp8_mem",
    "Using tensor model parallelism or context": "MLM-ARG-conn_fsdp",
    "For Hopper and before": "MLM-ARG-conn_moe",
    "--hybrid-layer-pattern is set": "MLM-ARG-hyb_layers",
    "--moe-layer-recompute is deprecated": "MLM-TC-rc_moelayer",
    "When using expert parallelism and tensor": "MLM-MPC-ep_tp_sp",
    "Megatron-FSDP v1 is only compatible": "MLM-ARG-mfsdp_distopt",
    "HyperConnections are enabled": "MLM-TC-mhc_modules",
    "--cuda-graph-scope is deprecated": "MLM-ARG-graph_scope_old",
    "full scope is deprecated": "MLM-ARG-graph_full_old",
    "moe_enable_deepep is deprecated": "MLM-TC-deepep_old",
    "--async-save is not supported": "MLM-ARG-async_save_off",
    "apply_rope_fusion for multi-latent": "MLM-TC-mla_fusion_training",
    "check_for_nan_in_loss_and_grad is set to False for fake": "MLM-ARG-fakepg_auto",
    "use_gloo_process_groups is set to False": "MLM-ARG-fakepg_auto",
    "enabling --no-load-optim": "MLM-ARG-skip_train",
    "--freeze-all-layers incompatible": "MLM-ARG-freeze_distopt",
    "FSDP double buffer and manual": "MLM-ARG-mfsdp_ncclub",
    "--mtp-hsm needs": "MLM-ARG-mtp_hsm_off",
    "optimizer='dist_muon' is deprecated": "MLM-ARG-muon_distopt",
    "--moe-router-padding-for-fp8": "MLM-TC-pad_fp8",
    "Please specify --split": "MLM-ARG-split_default",
    "FSDP2 FP8 param gather": "MLM-ARG-fsdp2_fp8pg",
    "moe_deepep_num_sms": "MLM-TC-sms_old",
}
"""What Megatron-LM warns of (how its line begins) -> the rule that says so here."""


def test_what_megatron_lm_warns_of_is_found() -> None:
    for row in (r for r in MEGATRON_LM if r["accepted"]):
        found = {f.id for f in resolved()[row["id"]].findings}
        if "--no-check-for-nan-in-loss-and-grad" in row["argv"]:
            found.add("MLM-ARG-fp16_nan")  # off already: nothing is changed
        for line in row["warnings"]:
            named = [rule for begins, rule in WARNINGS.items() if line.startswith(begins)]
            assert named, line
            assert named[0] in found, (row["id"], line)


def test_every_finding_is_complete_and_serialisable() -> None:
    for launch in resolved().values():
        for finding in launch.findings:
            json.dumps(finding.to_dict())
            assert finding.id, finding
            assert finding.field, finding
            assert finding.rule, finding
            assert finding.rule in finding.message, finding
            assert "{" not in finding.rule, finding


def test_errors_come_before_warnings_and_warnings_before_notes() -> None:
    for launch in resolved().values():
        severities = [f.severity for f in launch.findings]
        assert severities == sorted(severities, key=["error", "warning", "note"].index)


# --- laws ---

degrees = st.sampled_from([1, 2, 3, 4, 6, 8])


@given(tp=degrees, cp=degrees, pp=degrees, ep=degrees, etp=degrees, world=st.integers(1, 600))
def test_accepted_worlds_are_the_multiples_of_pp_times_the_lcm_of_both_grids(
    tp: int, cp: int, pp: int, ep: int, etp: int, world: int
) -> None:
    argv = (
        f"--num-layers 24 --hidden-size 1536 --num-attention-heads 24 --seq-length 3072 "
        f"--max-position-embeddings 3072 --micro-batch-size 1 --disable-bias-linear --bf16 "
        f"--tensor-model-parallel-size {tp} --context-parallel-size {cp} --ffn-hidden-size 6144 "
        f"--pipeline-model-parallel-size {pp} --expert-model-parallel-size {ep} "
        f"--expert-tensor-parallel-size {etp} --num-experts 24 --moe-ffn-hidden-size 1536 "
        f"--sequence-parallel --moe-router-topk 2"
    ).split()
    refused = errors_of(argv, world)
    assert (refused == set()) == (world % minimum_world_size(tp, cp, pp, ep, etp) == 0)
    assert refused <= {"MLM-ARG-world_div", "MLM-PS-world_expert"}


def test_the_two_frameworks_default_the_expert_tensor_parallel_size_differently() -> None:
    lm = resolve(
        [*SMALL, *flags("--tensor-model-parallel-size 4 --num-experts 8")],
        8,
        env=ONE_CONNECTION,
    )
    bridge = resolve(
        [
            *SMALL_BRIDGE,
            "model.tensor_model_parallel_size=4",
            "model.num_moe_experts=8",
            "model.expert_model_parallel_size=8",
        ],
        8,
        "megatron-bridge",
    )
    assert lm.values["expert_tensor_parallel_size"] == 4
    assert lm.sources["expert_tensor_parallel_size"] == "MLM-ARG-etp_default"
    assert bridge.values["expert_tensor_parallel_size"] == 1
    assert bridge.sources["expert_tensor_parallel_size"] == "MB-TC-etp_default"


def test_a_shared_rule_is_told_in_the_words_of_each_framework() -> None:
    lm = [*SMALL, *flags("--tensor-model-parallel-size 2 --num-experts 8")]
    bridge = [
        *SMALL_BRIDGE,
        "model.tensor_model_parallel_size=2",
        "model.num_moe_experts=8",
        "model.add_bias_linear=true",
    ]
    for argv, framework, remedy in (
        (lm, "megatron-lm", "Use --disable-bias-linear, or --expert-tensor-parallel-size 1."),
        (
            bridge,
            "megatron-bridge",
            "Use model.add_bias_linear=false, or model.expert_tensor_parallel_size=1.",
        ),
    ):
        found = mw.check_launch(argv, 8, framework, ONE_CONNECTION)
        assert [f.remedy for f in found if f.id == "MLM-TC-moe_bias_etp"] == [remedy]


def test_bridge_accepts_what_only_fails_later_and_warns_of_it() -> None:
    experts = ["model.num_moe_experts=8", "model.moe_router_topk=2"]
    argv = [*SMALL_BRIDGE, *experts, "model.tensor_model_parallel_size=2"]
    found = mw.check_launch(argv, 8, "megatron-bridge")
    assert [f.severity for f in found if f.id == "MLM-MOE-forward_sp"] == ["warning"]
    assert not [f for f in found if f.severity == "error"]


@pytest.mark.parametrize(
    ("layout", "rule"),
    [
        ([["embedding", "decoder"] + ["decoder"] * 3, ["decoder"] * 4 + ["loss"]], None),
        ([["embedding", "decoder"], ["decoder", "loss"]], "MLM-LAYOUT-layers"),
        ([["encoder"], ["loss"]], "MLM-LAYOUT-chars"),
        ([["embedding"]], "MLM-LAYOUT-div"),
    ],
)
def test_bridge_reads_a_pipeline_layout_written_as_lists(layout: Any, rule: str | None) -> None:
    argv = [*SMALL_BRIDGE, "model.pipeline_model_parallel_size=2"]
    argv.append(f"model.pipeline_model_parallel_layout={json.dumps(layout)}")
    launch = resolve(argv, 8, "megatron-bridge")
    assert first_error(launch) == rule


# --- the command line ---


@cache
def argparse_parser() -> argparse.ArgumentParser:
    """A parser with the same arguments, made by argparse: the truth about reading them."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    readers: dict[str, Any] = {"int": int, "float": float, "str": str, "pattern": pattern}
    for argument in {a.flags: a for a in arguments().values()}.values():
        options: dict[str, Any] = {"dest": argument.name, "default": argparse.SUPPRESS}
        if argument.action == "store":
            reader = readers.get(argument.type, str)
            options["type"] = reader
            options["choices"] = [reader(c) for c in argument.choices] or None
            if argument.nargs:
                options["nargs"] = (
                    int(argument.nargs) if argument.nargs.isdigit() else argument.nargs
                )
        elif argument.action == "on_off":
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["action"] = f"store_{'true' if argument.action == 'on' else 'false'}"
        flags = argument.flags[:1] if argument.action == "on_off" else argument.flags
        parser.add_argument(*flags, **options)
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would exit instead
    return parser


def _refuse(message: str) -> Any:
    raise ValueError(message)


READ_ALIKE = sorted(f for f, a in arguments().items() if a.type not in ("bool", "ints"))
words = st.one_of(
    st.sampled_from(READ_ALIKE),
    st.sampled_from(["1", "-1", "-0.5", "2", "x", "a b", "[0,1]", "--no", "-", "-x", "full", ""]),
    st.builds("{}={}".format, st.sampled_from(READ_ALIKE), st.sampled_from(["1", "x", "full", ""])),
)


@given(st.lists(words, max_size=8))
@settings(max_examples=150)
def test_a_command_line_is_read_as_argparse_reads_it(argv: list[str]) -> None:
    try:
        truth: dict[str, Any] | None = vars(argparse_parser().parse_args(argv))
    except (ValueError, argparse.ArgumentError):
        truth = None
    try:
        read: dict[str, Any] | None = parse(argv)
    except UnusableArgument:
        read = None
    assert read == truth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2", 2),
        ("[1,0]", [1, 0]),
        ("([0]*1+[1]*3)", [0, 1, 1, 1]),
        ("([1]*2+[0]*1)*2", [1, 1, 0, 1, 1, 0]),
    ],
)
def test_a_layer_pattern_is_a_number_or_an_expression_of_lists(text: str, value: Any) -> None:
    assert pattern(text) == value


@pytest.mark.parametrize(
    "text", ["", "[1", "[1]*[1]", "[1]+1", "[[1]]", "[1]*10**9", "[1]*999999999", "(1)[", "x[1]"]
)
def test_what_is_no_layer_pattern_is_refused_without_unrolling_it(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        pattern(text)


def test_an_unknown_flag_is_refused_with_the_nearest_known_ones() -> None:
    found = mw.check_launch([*SMALL, "--tensor-parallel-size", "2"], 8)
    assert [f.id for f in found] == ["MLM-ARGPARSE"]
    assert "--tensor-model-parallel-size" in found[0].remedy


def test_a_flag_cannot_be_abbreviated() -> None:
    assert errors_of([*SMALL, "--tensor-model-par", "2"]) == {"MLM-ARGPARSE"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.tensor_parallel_size=2", "no setting"),
        ("model.tensor_model_parallel_size=two", "a whole number"),
        ("model.tensor_model_parallel_size=null", "a whole number"),
        ("model.sequence_parallel=1", "true or false"),
        ("model.cp_comm_type=[1]", "a text or a list of texts"),
        ("model.num_layers", "path=value"),
        ("dataset_kind=video", "one of"),
        ("mixed_precision=[]", "a name"),
    ],
)
def test_an_unusable_override_is_a_finding_that_says_what_to_write(
    override: str, says: str
) -> None:
    found = mw.check_launch([*SMALL_BRIDGE, override], 8, "megatron-bridge")
    assert [f.id for f in found] == ["MB-OVERRIDE"]
    assert says in found[0].rule
    assert found[0].remedy


# --- whatever the arguments say is a finding ---

NUMBERS = ["0", "-1", "1", "2", "3", "8", "9223372036854775807", "9" * 40, "9" * 5000]
ODD = ["", "x", "é漢", "nan", "inf", "1e400", "[1", "[1]*9999999999", "E|t*9999999|L", "M*|M", "="]
values = st.sampled_from(NUMBERS + ODD + ["full", "selective", "flex", "true", "null", "[]", "{}"])


def _typed_value(flag: str) -> st.SearchStrategy[str]:
    choices = arguments()[flag].choices
    return st.one_of(st.sampled_from(choices), values) if choices else values


flag_and_value = st.sampled_from(sorted(arguments())).flatmap(
    lambda flag: st.one_of(
        st.just([flag]), st.lists(_typed_value(flag), max_size=2).map(lambda v: [flag, *v])
    )
)


@given(
    st.sampled_from([SMALL, *(r["argv"] for r in MEGATRON_LM[::100])]),
    st.lists(flag_and_value, max_size=4),
    st.integers(1, 2**31 - 1),
)
@settings(max_examples=150)
def test_no_megatron_lm_command_line_makes_the_check_fail(
    base: list[str], added: list[list[str]], gpus: int
) -> None:
    argv = [*base, *(word for words in added for word in words)]
    for finding in mw.check_launch(argv, gpus):
        json.dumps(finding.to_dict())


integer_flags = sorted(f for f, a in arguments().items() if a.type == "int" and not a.choices)
switches = sorted(f for f, a in arguments().items() if a.action != "store")


@given(
    st.sampled_from([SMALL, *(r["argv"] for r in MEGATRON_LM[::50] if r["accepted"])]),
    st.dictionaries(st.sampled_from(integer_flags), st.integers(-3, 70), max_size=4),
    st.lists(st.sampled_from(switches), max_size=6),
    st.integers(1, 64),
)
@settings(max_examples=150)
def test_no_readable_command_line_makes_the_check_fail(
    base: list[str], numbers: dict[str, int], turned: list[str], gpus: int
) -> None:
    argv = [*base, *(w for f, n in numbers.items() for w in (f, str(n))), *turned]
    for finding in mw.check_launch(argv, gpus, env={"site.te_version": None}):
        json.dumps(finding.to_dict())


@given(
    st.sampled_from([SMALL_BRIDGE, *(overrides(r) for r in BRIDGE[::25])]),
    st.lists(st.tuples(st.sampled_from(sorted(bridge_settings())), values), max_size=5),
    st.integers(1, 64),
)
@settings(max_examples=150)
def test_no_override_makes_the_check_fail(
    base: list[str], added: list[tuple[str, str]], gpus: int
) -> None:
    argv = [*base, *(f"{path}={value}" for path, value in added)]
    for finding in mw.check_launch(argv, gpus, "megatron-bridge"):
        json.dumps(finding.to_dict())


@given(st.lists(st.text(max_size=12), max_size=6))
@settings(max_examples=50)
def test_arbitrary_words_are_judged_too(argv: list[str]) -> None:
    assert first_error(resolve(argv, 8)) is not None
    mw.check_launch(argv, 8, "megatron-bridge")


@pytest.mark.parametrize(
    ("arguments_", "field"),
    [
        ({"argv": SMALL, "gpus": 0}, "gpus"),
        ({"argv": SMALL, "gpus": True}, "gpus"),
        ({"argv": SMALL, "gpus": "8"}, "gpus"),
        ({"argv": SMALL, "gpus": 10**12}, "gpus"),
        ({"argv": SMALL, "gpus": 8, "framework": "jax"}, "framework"),
        ({"argv": SMALL, "gpus": 8, "framework": None}, "framework"),
        ({"argv": "--bf16", "gpus": 8}, "argv"),
        ({"argv": [1, 2], "gpus": 8}, "argv"),
        ({"argv": None, "gpus": 8}, "argv"),
        ({"argv": SMALL, "gpus": 8, "env": ["A=1"]}, "env"),
        ({"argv": SMALL, "gpus": 8, "env": {"site.te_version": "new"}}, "site.te_version"),
        (
            {"argv": SMALL, "gpus": 8, "env": {"site.device_capability": 9}},
            "site.device_capability",
        ),
    ],
)
def test_a_wrong_use_of_the_check_itself_is_an_error(
    arguments_: dict[str, Any], field: str
) -> None:
    with pytest.raises(mw.MeshwrightError) as raised:
        mw.check_launch(**arguments_)
    assert raised.value.field == field
    assert raised.value.rule
    assert raised.value.remedy


# --- the tables ---


def test_every_rule_names_its_place_and_says_how_to_put_it_right() -> None:
    for rule in (*megatron_rules(), *bridge_rules()):
        if rule.severity is None:
            continue
        assert rule.id.startswith(("MLM-", "MB-")), rule
        assert rule.rule, rule
        assert rule.field, rule
        assert rule.remedy or rule.severity == "note", rule


def test_every_argument_has_a_default_that_it_would_accept() -> None:
    for argument in by_name().values():
        default = argument.default
        if argument.choices and default is not None and not isinstance(default, list):
            assert str(default) in argument.choices, argument
        if argument.action in ("on", "off"):
            assert default in (True, False, None), argument


def test_a_thousand_launches_take_a_few_seconds() -> None:
    begin = time.perf_counter()
    for row in MEGATRON_LM[:500]:
        mw.check_launch(row["argv"], row["world_size"])
    for row in BRIDGE:
        mw.check_launch(overrides(row), row["world_size"], "megatron-bridge")
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("name", ["gtp_weight_remat_size", "expert_gtp_weight_remat_size"])
def test_shards_of_bridge_are_at_least_one(name: str) -> None:
    found = mw.check_launch([*SMALL_BRIDGE, f"model.{name}=0"], 8, "megatron-bridge")
    assert (found[0].id, found[0].field) == ("MB-CFG-positive", f"model.{name}")


def test_training_of_bridge_is_counted_in_samples_once_iterations_are_unset() -> None:
    samples = ["train.train_samples=80", "scheduler.lr_decay_samples=80"]
    assert "MB-CFG-train_mode_one" in errors_of([*SMALL_BRIDGE, *samples], 8, "megatron-bridge")
    unset = [*SMALL_BRIDGE, "train.train_iters=null", *samples]
    assert errors_of(unset, 8, "megatron-bridge") == set()

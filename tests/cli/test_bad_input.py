"""Bad input: one message with field, value, rule and remedy, and the exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import (
    BATCH,
    Run,
    told_in_one_message,
)

LAYOUTS: list[tuple[str, str]] = [
    ("tp=3", "layout.tp"),
    ("tp=0", "layout.tp"),
    ("tp=-2", "layout.tp"),
    ("tp=1000000000", "layout"),
    ("tp=99999999999999999999999", "layout.tp"),
    ("tp=two", "layout.tp"),
    ("tp=1.5", "layout.tp"),
    ("tp=", "layout.tp"),
    ("tp=32", "layout"),
    ("width=1", "layout.width"),
    ("tp", "layout"),
    ("tp=2 tp=4", "layout.tp"),
    ("pp=7", "layout.pp"),
    ("pp=81", "layout"),
    ("dp=3", "layout.dp"),
    ("ep=2", "layout.ep"),
    ("edp=7", "layout.edp"),
    ("cp=3", "layout.cp"),
    ("sp=maybe", "layout.sp"),
    ("zero=4", "layout.zero"),
    ("recompute=some", "layout.recompute"),
    ("recompute=full:uniform", "layout.recompute"),
    ("recompute=full:block:0", "layout.recompute"),
    ("schedule=fastest", "layout.schedule"),
    ("vpp=3", "layout.vpp"),
    ("pp=4 vpp=64", "layout.vpp"),
    ("order=tp-tp", "layout.order"),
    ("order=up-down", "layout.order"),
    ("pp=4 pipeline_layout=xx", "layout.pipeline_layout"),
    ("pp=4 pipeline_layout=Et|tL", "layout.pipeline_layout"),
    ("mbs=3", "job.gbs"),
    ("mbs=1024", "job.gbs"),
    ("dp_replicate=3", "layout.dp_replicate"),
    ("hierarchical_cp=2x3", "layout.hierarchical_cp"),
    ("pp=4 first=100", "layout"),
    ("microbatch_group_size=-1", "layout.microbatch_group_size"),
    ("pp=4 schedule=zb_v vpp=4", "layout"),
]


@pytest.mark.parametrize(("layout", "field"), LAYOUTS)
def test_an_impossible_layout_is_told_in_one_message(
    run: Run, model: str, layout: str, field: str
) -> None:
    told_in_one_message(run("estimate", model, "16xH100", "--layout", layout, *BATCH), field)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--seq-len", "0", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "-1", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "99999999999999999999", "--global-batch-size", "64"), "job.seq_len"),
        (("--seq-len", "4096", "--global-batch-size", "0"), "job.gbs"),
        (("--seq-len", "4096", "--global-batch-size", "63"), "job.gbs"),
        ((*BATCH, "--precision", "fp7"), "job.precision"),
        ((*BATCH, "--task", "dream"), "job.task"),
    ],
)
def test_an_impossible_job_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run("estimate", model, "16xH100", "--layout", "tp=2", *words), field)


@pytest.mark.parametrize(
    "cluster",
    [
        *("64xH1000", "64x", "0xH100", "8x0xH100", "99999999999999999999xH100", "", "12xH100"),
        *("H100", "xH100", "6.5xH100", "no-such.toml", "/"),
    ],
)
def test_an_impossible_cluster_is_told_in_one_message(run: Run, model: str, cluster: str) -> None:
    told_in_one_message(run("estimate", model, cluster, "--layout", "tp=2", *BATCH), "")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "model"),
        ('{"model_type": "llama", "hidden_size":', "model"),
        ("[1, 2]", "model"),
        ('{"hidden_size": 1024}', "config.model_type"),
        ('{"model_type": "perceptron"}', "config.model_type"),
        ('{"model_type": "llama", "hidden_size": -1}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": 0}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": 1e30}', "config.hidden_size"),
        ('{"model_type": "llama", "hidden_size": [1]}', "config.hidden_size"),
        ('{"model_type": "llama", "num_hidden_layers": 0}', "config.num_hidden_layers"),
        ('{"model_type": "llama", "num_attention_heads": 7, "num_key_value_heads": 2}', "heads"),
    ],
)
def test_an_unusable_config_is_told_in_one_message(
    run: Run, tmp_path: Path, text: str, field: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    words = ("16xH100", "--layout", "tp=2", *BATCH)
    told_in_one_message(run("estimate", str(tmp_path), *words), field)


@pytest.mark.parametrize("name", ["no/such/config.json", "lama3-70b", "", "/", "/dev/null"])
def test_a_missing_model_is_told_in_one_message(run: Run, name: str) -> None:
    told_in_one_message(run("plan", name, "16xH100", *BATCH), "model")


def test_a_binary_file_is_no_config(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(bytes(range(256)))
    told_in_one_message(run("plan", str(path), "16xH100", *BATCH), "model")


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("--fix", "width=2"), "fix"),
        (("--fix", "tp=0"), "fix.tp"),
        (("--fix", "tp=3"), "plan"),
        (("--fix", "tp=1..9999999999"), "fix.tp"),
        (("--fix", "tp=2", "--fix", "tp=4"), "fix.tp"),
        (("--max-memory", "0GB"), "max_memory"),
        (("--max-memory", "-5GB"), "max_memory"),
        (("--max-memory", "plenty"), "max_memory"),
        (("--for", "abacus"), "framework"),
    ],
)
def test_an_impossible_search_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run("plan", model, "16xH100", *BATCH, *words), field)


def test_a_batch_that_no_layout_divides_is_told_in_one_message(run: Run, model: str) -> None:
    words = ("--seq-len", "4096", "--global-batch-size", "1", "--fix", "dp=2")
    told_in_one_message(run("plan", model, "16xH100", *words), "plan")


@pytest.mark.parametrize("path", ["missing/plan.toml", "", "."])
def test_an_output_that_cannot_be_written_is_told_before_the_search(
    run: Run, model: str, tmp_path: Path, path: str
) -> None:
    target = str(tmp_path / path) if path else ""
    told_in_one_message(run("plan", model, "16xH100", *BATCH, "-o", target), "output")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (("explain", "MODEL", "16xH100", "speed_s", "--layout", "tp=2", *BATCH), "term"),
        (("explain", "MODEL", "16xH100", "--layout", "tp=3", *BATCH), "layout.tp"),
        (("explain", "MODEL", "16xH100", "--layout", "tp=2", "--why-not", "x", *BATCH), "layout"),
        (("list", "everything"), "list"),
        (("ranks", "--gpus", "0"), "layout.gpus"),
        (("ranks", "--gpus", "12", "--layout", "tp=8"), "layout.tp"),
        (("ranks", "--gpus", "1000000000"), "layout.world_size"),
        (("ranks", "--gpus", "8", "--layout", "width=2"), "layout.width"),
    ],
)
def test_other_bad_input_is_told_in_one_message(
    run: Run, model: str, words: tuple[str, ...], field: str
) -> None:
    told_in_one_message(run(*(model if w == "MODEL" else w for w in words)), field)


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (("estimate", "MODEL", "8xH100", "--layout", "tp=-1"), "Use 1 or more."),
        (("estimate", "MODEL", "8xH100", "--layout", "tp=99999999999"), "Use less."),
        (("estimate", "MODEL", "8xH100", "--layout", "cp=4 hierarchical_cp=2x"), "=2x2."),
        (("estimate", "MODEL", "8xRTX 4090", "--layout", "tp=1"), "Choose from A100"),
        (("estimate", "no/config.json", "8xH100", "--layout", "tp=1"), "meshwright list models"),
        (("plan", "MODEL", "8xH100", "--seq-len", "9999999999999"), "Use fewer."),
        (("plan", "MODEL", "8xH100", "--fix", "foo=1"), "vpp, zero."),
    ],
)
def test_a_message_says_the_way_out(
    run: Run, model: str, words: tuple[str, ...], way_out: str
) -> None:
    answer = run(*(model if word == "MODEL" else word for word in words))
    assert answer.status == 2
    assert way_out in answer.err

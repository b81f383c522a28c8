"""Shell scripts are followed as bash would, as far as that needs no running."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import DocumentError
from meshwright.frameworks.launchers import sbatch_counts, started
from meshwright.frameworks.shell import parse


def words(text: str) -> list[list[str]]:
    return [[w.text for w in command.words] for command in parse(text).commands]


def test_quotes_continuations_and_comments_are_those_of_bash() -> None:
    script = "run a 'b c' \"d e\" \\\n  f\\ g # not this\nrun h#i\n"
    assert words(script) == [["run", "a", "b c", "d e", "f g"], ["run", "h#i"]]


def test_variables_defaults_and_arithmetic_are_followed() -> None:
    script = """
TP=4; NODES=${NODES:-2}
WORLD=$((NODES * 8))
run --tp $TP --world "${WORLD}" ${EMPTY:-} ${TP:+set} $((WORLD / TP % 3)) -$((2-(3)))
"""
    assert words(script) == [["run", "--tp", "4", "--world", "16", "set", "1", "--1"]]


def test_arrays_are_appended_and_expanded_word_by_word() -> None:
    script = 'A=(--x 1 # why\n "--y z")\nA+=(--w)\nrun "${A[@]}" "${A[*]}" ${#A[@]} ${A[1]}\n'
    assert words(script) == [["run", "--x", "1", "--y z", "--w", "--x 1 --y z --w", "4", "1"]]


def test_an_unquoted_variable_is_split_into_words_and_a_quoted_one_is_not() -> None:
    assert words('O="--a 1  --b"\nrun $O "$O" x$O') == [
        ["run", "--a", "1", "--b", "--a 1  --b", "x--a", "1", "--b"]
    ]


def test_known_conditions_choose_a_branch_and_unknown_ones_are_told() -> None:
    script = """
N=4
if [ "$N" -gt 1 ]; then A=many; elif true; then A=x; else A=one; fi
[ -z "$N" ] && A=none
case $N in 2|4) B=even ;; *) B=odd ;; esac
if grep -q x file; then C=1; fi
[[ $A == ma* && 1 ]] || B=never
run $A $B $C
"""
    read = parse(script)
    assert [w.text for w in read.commands[-1].words] == ["run", "many", "even", "1"]
    assert any("condition of if is not known" in line for line in read.unread)


def test_what_only_a_running_shell_knows_stays_as_written_and_is_named() -> None:
    (command,) = parse('D=$(cat path.txt)\nrun --data "$D" --n $N `date` "$@"').commands
    unknown = {w.text: w.unknown for w in command.words if w.unknown}
    assert unknown == {
        "$(cat path.txt)": ("$(cat path.txt)",),
        "$N": ("$N",),
        "`date`": ("`date`",),
        "$@": ("$@",),
    }


def test_exports_and_prefixes_become_the_environment() -> None:
    a, b = parse("export A=1 B\nB=2\nC=3 run\nrun\n").commands
    assert (dict(a.env), dict(b.env)) == ({"A": "1", "B": "2", "C": "3"}, {"A": "1", "B": "2"})


def test_a_script_inside_a_command_or_a_here_document_is_read() -> None:
    assert words('X=4\nsrun -n 2 bash -c "run --tp $X"\n') == [
        ["srun", "-n", "2", "run", "--tp", "4"]
    ]
    assert words("sbatch <<EOF\nrun --tp 8\nEOF\nrun last\n") == [
        ["run", "--tp", "8"],
        ["run", "last"],
    ]
    assert words("cat > f <<'EOF'\nrun no\nEOF\nrun yes\n")[-1] == ["run", "yes"]


def test_nothing_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    script = f"touch {target}\nX=$(touch {target})\n`touch {target}`\neval touch {target}\n"
    parse(script)
    assert not target.exists()


@pytest.mark.parametrize(
    ("line", "world"),
    [
        ("torchrun --nproc_per_node 8 --nnodes=4 train.py", 32),
        ("torchrun --nproc-per-node=8 --nnodes 2:2 -m train", 16),
        ("python -m torch.distributed.run --nproc_per_node 4 train.py", 4),
        ("srun -N4 --ntasks-per-node=8 python -u train.py", 32),
        ("srun --nodes 2 --gres gpu:h100:8 torchrun --nnodes 2 --nproc_per_node 8 train.py", 16),
        ("mpirun -np 64 -x A=1 --mca btl self python train.py", 64),
        ("uv run --isolated --extra megatron torchrun --nproc_per_node 2 train.py", 2),
        ("env A=1 nohup python3.11 train.py", 0),
        ("torchrun --nproc_per_node $N train.py", 0),
    ],
)
def test_launchers_say_how_many_processes_they_start(line: str, world: int) -> None:
    (command,) = parse(line).commands
    found = started(command)
    assert found is not None
    assert found.program.text in ("train.py", "train")
    assert found.counts.total == world


def test_batch_options_count_nodes_and_set_slurms_variables() -> None:
    script = parse(
        "#SBATCH --nodes=4 --gpus-per-node=8\n#SBATCH --ntasks-per-node 1\n"
        "srun torchrun --nnodes $SLURM_NNODES --nproc_per_node 8 train.py\n"
    )
    found = started(script.commands[0], sbatch_counts(script))
    assert found is not None
    assert found.counts.total == 32


def test_expansion_that_doubles_again_and_again_is_refused() -> None:
    bomb = "A=xxxxxxxxxx\n" + "".join("A=$A$A$A$A$A$A$A$A\n" for _ in range(40))
    with pytest.raises(DocumentError, match="expands to more"):
        parse(bomb)


@pytest.mark.parametrize(
    "text",
    [
        "${" * 5000,
        "$((" + "(" * 5000,
        "A=(" * 3000,
        "if [ x" * 3000,
        'bash -c "' * 200,
        "case x in " * 2000,
        "<<E" * 2000 + "\n" + "x\n" * 2000,
        "${A:-" * 3000 + "}" * 3000,
        "\\",
        "$",
        "'",
        '"${A[',
        "run ${A:-${A:-${A}}} $((1/0)) $((9**9)) $((99999999999999999999*9))",
    ],
)
def test_hostile_text_ends_quickly_without_a_traceback(text: str) -> None:
    began = time.monotonic()
    parse(text)
    assert time.monotonic() - began < 5


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aA1=$(){}[]\"'`\\ \n;&|<>#+-*/:@!?\t", max_size=200))
def test_any_text_is_read_without_a_traceback(text: str) -> None:
    parse(text)


PIECES = st.sampled_from(
    ["a", "b1", " ", "'q r'", '"$V w"', "$V.", "${V}", "${U:-d}", "$((N+2))", "\\ ", "${L[@]}"]
)


@settings(max_examples=25, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_expansion_agrees_with_bash(pieces: list[str]) -> None:
    """Oracle: bash itself, on words that need no other program."""
    setup = "V='x  y'; N=5; L=(1 '2 3')\n"
    line = "".join(pieces)
    shown = subprocess.run(
        ["bash", "-c", f"{setup}printf '%s\\n' run {line}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (command,) = parse(f"{setup}run {line}").commands
    assert "".join(f"{w.text}\n" for w in command.words) == shown


def test_the_words_of_eval_are_the_command_that_they_spell() -> None:
    script = (
        "OPTIONS=\"--tensor-model-parallel-size 2 --moe-layer-freq '([0]*1+[1]*3)'\"\n"
        'run_cmd="torchrun --nproc_per_node 8 --nnodes $NODES pretrain_gpt.py ${OPTIONS}"\n'
        "echo ${run_cmd}\neval ${run_cmd}\n"
    )
    command = words(script)[-1]
    assert command[-4:] == [
        "--tensor-model-parallel-size",
        "2",
        "--moe-layer-freq",
        "([0]*1+[1]*3)",
    ]


def test_eval_of_what_only_the_machine_knows_is_listed() -> None:
    for script in ('eval "$(conda shell.bash hook)"\n', "eval $X\n", "eval\n", 'A="eval $A"\n$A\n'):
        assert all("eval" in line for line in parse(script).unread)


FUNCTIONS = r"""
function show { for x in "$@"; do printf '[%s]' "$x"; done; printf '\n'; }
launch() {
  local tp=$1 pp="${2:-1}"; shift 2
  { echo brace; }
  TP=8
  emit --tp $tp --pp $pp --n $# "$@" "${@:2}" "$*" ${10} $((tp * 2)) $tp$TP
}
tp=none
if [ 1 = 2 ]; then never() { emit never; }; fi
"""


@pytest.mark.parametrize(
    "call",
    [
        "launch 2 4 --sp 'a b'",
        "launch 2 '' x",
        "launch 2 4; emit $tp $TP",
        'A=(4 1 --x y); launch ${A[@]}; launch "${A[@]:1:2}"',
        'set -- 1 2 3; launch "$@"; emit $# $3',
    ],
)
def test_functions_are_followed_with_the_words_of_their_call(call: str) -> None:
    """Oracle: bash itself, where ``emit`` prints the words that it is given."""
    printing = "emit() { printf '%s\\037' emit \"$@\"; printf '\\n'; }\n"
    shown = subprocess.run(
        ["bash", "-c", f"{printing}{FUNCTIONS}{call}\n"], capture_output=True, text=True, check=True
    ).stdout
    expected = [line.split("\037")[:-1] for line in shown.splitlines() if "\037" in line]
    assert [w for w in words(f"{FUNCTIONS}{call}\n") if w[0] == "emit"] == expected


def test_a_function_given_the_arguments_of_the_script_knows_only_its_own_defaults() -> None:
    (command,) = parse('f() { run --tp ${1:-4} --pp $2 "$@"; }\nf "$@"\n').commands
    assert [w.text for w in command.words] == ["run", "--tp", "4", "--pp", "$2", "$@"]
    (command,) = parse('f() { run --tp $1 --n $# "${@:2}"; }\nf 2 "$@"\n').commands
    assert [w.text for w in command.words] == ["run", "--tp", "2", "--n", "$#", "$@"]


def test_the_environment_before_a_call_is_that_of_what_the_function_starts() -> None:
    inner, after = parse("f() { B=2 run; }\nA=1 f\nrun\n").commands
    assert (dict(inner.env), dict(after.env)) == ({"A": "1", "B": "2"}, {})


@pytest.mark.parametrize(
    "text",
    [
        ":(){ :|:& };:\n",
        "f() { f; f; }\n" * 3000 + "f\n",
        "".join(f"f{n}() {{ {f'f{n + 1};' * 50} }}\n" for n in range(9)) + "f0\n",
        "f() { " * 4000 + "f\n",
        "f() { run $1 $@ $@ $@; f2 $@ $@; }; f2() { f3 $@ $@ $@; }; f3() { f $@; run $@ $@; }\n"
        * 50
        + "f "
        + "a " * 5000,
    ],
)
def test_functions_that_call_each_other_end(text: str) -> None:
    began = time.monotonic()
    try:
        read = parse(text)
        assert any("calls itself" in line for line in read.unread) or "f() { f() {" in text
    except DocumentError as refused:
        assert "more than" in str(refused)
    assert time.monotonic() - began < 5


def test_a_mistyped_option_of_torchrun_is_named_with_the_one_that_was_meant() -> None:
    (command,) = parse(
        "torchrun --nproc_per_nodes 8 --rdzv-id 1 --max_restarts=0 train.py"
    ).commands
    found = started(command)
    assert found is not None
    assert (found.program.text, found.counts.total) == ("train.py", 0)
    (line,) = found.unread
    assert "--nproc_per_nodes" in line
    assert "nproc-per-node?" in line

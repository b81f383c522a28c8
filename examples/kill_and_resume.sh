#!/usr/bin/env bash
# Trains a tiny model for 200 steps on 4 processes, then again: killed on the way and resumed under
# another layout. Both runs must have the same loss curve.
#
#     examples/kill_and_resume.sh [FOLDER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$(mktemp -d)}
bin=${BIN:-$here/../.venv/bin}
mkdir -p "$out"

start() {  # metrics, then layout and further words
    local metrics=$1 layout=$2
    shift 2
    OMP_NUM_THREADS=1 exec "$bin/torchrun" --standalone --nproc-per-node 4 -m meshwright \
        train "$here/tiny-llama.json" --layout "$layout" --seq-len 64 --steps 200 \
        --lr 3e-3 --warmup-steps 20 --log-every 50 --metrics "$metrics" "$@"
}

(start "$out/whole.jsonl" "tp=2 pp=2")

start "$out/broken.jsonl" "tp=2 pp=2" --checkpoints "$out/saved" --save-every 40 &
launcher=$!
until [ -d "$out/saved/step-00000080" ]; do sleep 0.2; done
kill -TERM $launcher
wait $launcher || true

(start "$out/broken.jsonl" "dp=4 zero=optim_grads_params" --checkpoints "$out/saved")

"$bin/python" - "$out" <<'PYTHON'
import json, pathlib, sys

def losses(name):
    lines = pathlib.Path(sys.argv[1], name).read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}

whole, broken = losses("whole.jsonl"), losses("broken.jsonl")
assert whole.keys() == broken.keys() == set(range(1, 201))
far = max(abs(broken[step] / whole[step] - 1) for step in whole)
print(f"loss {whole[1]:.3f} at step 1, {whole[200]:.3f} at step 200; "
      f"the broken run differs by at most {far:.1e}")
sys.exit(far > 1e-3)
PYTHON

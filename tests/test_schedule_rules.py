"""The rules and the schedules agree on which pipelines run. Provenance: law."""

from __future__ import annotations

import pytest

from meshwright.checks import Case, judge_one
from meshwright.describe.job import Job
from meshwright.describe.models import load_model
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Pipeline, layout, table
from meshwright.parallel.pipeline import build_schedule

CHUNKS = {
    Pipeline.gpipe: (1,),
    Pipeline.one_f_one_b: (1,),
    Pipeline.interleaved: (2, 4),
    Pipeline.zb_h1: (1,),
    Pipeline.zb_v: (2,),
}


@pytest.mark.parametrize("schedule", CHUNKS)
@pytest.mark.parametrize("pp", [1, 2, 3, 4, 8])
def test_a_rule_fires_exactly_where_the_schedule_cannot_be_built(
    schedule: Pipeline, pp: int
) -> None:
    model = load_model("llama3-70b")
    for vpp in CHUNKS[schedule]:
        for num_microbatches in range(1, 25):
            case = Case(
                model=model,
                job=Job(seq_len=4096, gbs=num_microbatches),
                x=table([layout(pp=pp, vpp=vpp, schedule=schedule, gpus=pp)]),
            )
            found = [f for f in judge_one(case) if f.severity == "error"]
            refused = [f for f in found if "layer" not in f.rule]
            try:
                build_schedule(schedule, pp, vpp, num_microbatches)
                builds = True
            except LayoutError:
                builds = False
            assert builds == (not refused), (vpp, num_microbatches, refused)

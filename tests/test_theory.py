"""Parameters per rank and model FLOPs against Megatron-LM's own (oracle: data/theory.jsonl.gz)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import theory
from meshwright.cost.flops import model_flops_per_step
from meshwright.cost.parameters import block_params_per_rank, padded_vocab_size
from meshwright.cost.stages import PipelineKey, layer_facts, stages
from meshwright.describe.job import job
from meshwright.parallel.layout import Pipeline

ROWS = theory.rows()


def stage_params(config: dict[str, Any]) -> list[list[float]]:
    """Return [non-expert, expert] parameters of one rank of every pipeline stage."""
    # The oracle builds the model without its multi-token-prediction layers.
    model = theory.model_of(config | {"mtp": None})
    key = PipelineKey(
        schedule=int(Pipeline.interleaved if config["vpp"] else Pipeline.one_f_one_b),
        pp=config["pp"],
        vpp=config["vpp"] or 1,
        num_microbatches=config["pp"],
        microbatch_group_size=0,
        first=config["first"] or 0,
        last=config["last"] or 0,
        account_for_embedding=0,
        account_for_loss=0,
        recompute_block=0,
        recompute_num_layers=0,
        pipeline_layout=None,
    )
    held = stages(layer_facts(model), key).params
    dense, expert = block_params_per_rank(model, theory.layouts_of(config))
    both = np.stack([np.einsum("pk,k->p", held, dense[0]), np.einsum("pk,k->p", held, expert[0])])
    return both.T.tolist()


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_every_stage_holds_the_parameters_that_megatron_builds(row: dict[str, Any]) -> None:
    built = row["megatron_lm"]["built_parameters"]["stages"]
    assert stage_params(row["config"]) == [[s["non_expert"], s["expert"]] for s in built]


@pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])
def test_model_flops_of_a_step_are_those_that_megatron_logs(row: dict[str, Any]) -> None:
    config, model = row["config"], theory.model_of(row["config"])
    padded = int(padded_vocab_size(model.vocab_size, theory.layouts_of(config))[0])
    assert padded == row["megatron_lm"]["padded_vocab_size"]
    flops = model_flops_per_step(
        model, job(seq_len=config["seq_length"], gbs=config["gbs"]), padded
    )
    assert flops == pytest.approx(row["megatron_lm"]["model_flops_per_global_batch"], rel=1e-12)

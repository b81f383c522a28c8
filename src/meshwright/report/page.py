"""The page of a plan: one HTML file, its pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape

from meshwright.parallel.layout import to_text
from meshwright.plans import Plan
from meshwright.report import pictures
from meshwright.units import format_bytes, format_count, format_flops_per_s, format_s

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
       color: #222; background: white }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
code { background: #f2f2f2; padding: .1em .3em; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content auto; gap: .2em 1.5em }
dt { color: #666 } dd { margin: 0 } svg { max-width: 100%; height: auto }
"""


def page(plan: Plan) -> str:
    """Return the HTML page of a plan."""
    e, job = plan.estimate, plan.job
    timeline, shown = pictures.pipeline(plan)
    num_microbatches = job.gbs // (plan.layout.dp * plan.layout.mbs)
    facts = {
        "model": f"{plan.model.name}, {format_count(plan.model.num_params)} parameters",
        "cluster": f"{plan.cluster.name}, {plan.layout.world_size} GPUs",
        "step": f"{job.gbs} sequences of {job.seq_len} tokens, {job.precision.name}, {job.task}",
        "step time": f"{format_s(e.step_time_s)}, {e.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
        f"{format_flops_per_s(e.model_flops_per_s_per_gpu)}, MFU {e.mfu_fraction:.1%}",
        "peak": f"{format_bytes(e.peak_bytes)} of {format_bytes(e.capacity_bytes)}: {e.verdict}",
    }
    listed = "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    notes = [f"{f.severity}: {f.message}" for f in plan.findings if not f.field.startswith("env.")]
    parts = [
        f"<h1>{escape(plan.model.name)} on {escape(plan.cluster.name)}</h1>",
        f"<dl>{listed}</dl><p><code>{escape(to_text(plan.layout))}</code></p>",
        f"<h2>Where the memory goes</h2>{pictures.memory(plan)}",
        f"<h2>Where the time goes</h2><p>Exposed, slowest rank.</p>{pictures.step(plan)}",
        f"<h2>The pipeline</h2><p>{shown} micro-batches, of {num_microbatches} in a step; "
        f"gaps are the bubble, later chunks are paler.</p>{timeline}",
        _list("To know", notes),
        _list("Why it won", plan.why),
        _list("Assumed", e.assumed),
    ]
    title = f"meshwright: {escape(plan.model.name)} on {escape(plan.cluster.name)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _list(title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<h2>{title}</h2><ul>{items}</ul>" if lines else ""

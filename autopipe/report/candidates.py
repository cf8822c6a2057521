"""The ways to use the devices that a plan was chosen from: a table, and a sentence on why the first one wins."""

from __future__ import annotations

from autopipe.plan import Candidate, Plan
from autopipe.report.tables import Column, Table
from autopipe.units import MIB

COLUMNS = (
    Column(name="replicas"),
    Column(name="ranks each"),
    Column(name="stages"),
    Column(name="micro-batches"),
    Column(name="samples each"),
    Column(name="schedule"),
    Column(name="ZeRO"),
    Column(name="neighbours"),
    Column(name="recompute"),
    Column(name="peak MiB", decimals=1),
    Column(name="step ms", decimals=2),
    Column(name="not below ms", decimals=2),
)


def candidate_table(plan: Plan) -> Table:
    """A row for each way, the fastest first."""
    rows = tuple(
        (
            c.data_parallel,
            c.num_ranks,
            c.num_stages,
            c.num_microbatches,
            c.microbatch_size,
            c.schedule,
            c.zero_stage,
            c.placement if c.data_parallel > 1 and c.num_ranks > 1 else "",
            "yes" if c.recomputed else "",
            c.peak_bytes / MIB,
            c.step_us / 1e3,
            c.lower_bound_us / 1e3,
        )
        for c in plan.candidates
    )
    return Table(title="ways to use the devices", columns=COLUMNS, rows=rows)


def why(plan: Plan) -> str:
    """Parts of the chosen way's step, time of the next other way, and the lower bound of all."""
    best = plan.candidates[0]
    compute = plan.num_microbatches * max(s.forward_us + s.backward_us for s in plan.stages) / 1e3
    if best.num_stages > best.num_ranks:
        ranks = [
            sum(s.forward_us + s.backward_us for s in plan.stages[r :: best.num_ranks]) for r in range(best.num_ranks)
        ]
        compute = plan.num_microbatches * max(ranks) / 1e3
    reduce = max(s.reduce_us for s in plan.stages) / 1e3
    step = plan.step_us / 1e3
    words = [
        f"{_named(best)} is the fastest of the ways that were planned: its busiest rank computes {compute:.2f} ms of a "
        f"step of {step:.2f} ms, and gradients are summed over the replicas in up to {reduce:.2f} ms."
    ]
    other = next((c for c in plan.candidates if _shape(c) != _shape(best)), None)
    if other is not None:
        words.append(f"{_named(other)} takes {100 * (other.step_us / best.step_us - 1):.1f} % longer.")
    if plan.search_bound_us:
        bound = plan.search_bound_us / 1e3
        words.append(
            f"No way can take less than {bound:.2f} ms: the plan is {100 * (step / bound - 1):.1f} % above it."
        )
    words.append(
        {
            "": "",
            "affine": "Times at this micro-batch size lie on a line through those that were measured at two sizes.",
            "proportional": "Times are assumed to be in proportion to the micro-batch size: one size was profiled. "
            "A second "
            "profile, of another size, would show what a micro-batch costs by itself.",
        }[plan.scaling]
    )
    return " ".join(word for word in words if word)


def _shape(candidate: Candidate) -> tuple[int, int]:
    return candidate.data_parallel, candidate.num_ranks


def _named(candidate: Candidate) -> str:
    replicas = f"{candidate.data_parallel} replica{'s' if candidate.data_parallel > 1 else ''}"
    stages = f"{candidate.num_stages} stage{'s' if candidate.num_stages > 1 else ''}"
    return f"{replicas} of {stages} on {candidate.num_ranks} rank{'s' if candidate.num_ranks > 1 else ''}"

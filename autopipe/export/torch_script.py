"""Write a program that trains a plan's model under a schedule of torch.distributed.pipelining."""

from __future__ import annotations

import json

from autopipe.errors import ConfigError, PlanError
from autopipe.plan import Plan

TEMPLATE = '''"""Plan {hash} under torch.distributed.pipelining: {stages} stages, {count} micro-batches.

    torchrun --nproc-per-node {ranks} THIS_FILE         (any divisor of {stages} runs: several stages a rank are interleaved)

Written by `autopipe export`. `stages()` gives this rank's stages; `main()` runs one step on the example batch.
"""

import json

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from autopipe import Plan, capture
from autopipe.cli.models import load_example
from autopipe.engine.step.microbatch import split
from autopipe.export import pipeline_stage, sum_tied_gradients, torch_stages

MODEL = {model!r}
PLAN = Plan.from_json(json.loads(r"""
{plan}
"""))


def stages():
    """This rank's stage modules, and the tensors of the example batch in the order in which the first stage takes them."""
    torch.manual_seed(0)
    example = load_example(MODEL)
    microbatch = split(example.args, example.kwargs, None, PLAN.num_microbatches)[0]
    captured = capture(example.model, microbatch.args, microbatch.kwargs)
    if captured.loss is not None:
        captured = captured.loss_only()
    mine = torch_stages(captured, PLAN)[dist.get_rank() :: dist.get_world_size()]
    return mine, captured.flatten(example.args, example.kwargs), captured.loss is not None


def main():
    kind = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    dist.init_process_group(dist.get_default_backend_for_device(kind))
    device = kind if kind.type == "cpu" else torch.device(kind.type, dist.get_rank() % torch.accelerator.device_count())
    mine, batch, has_loss = stages()
    for stage in mine:
        stage.to(device)

    def loss_fn(output, target):
        if has_loss:
            return output.sum()  # the model's own loss, of shape (1,)
        outputs = output if isinstance(output, tuple) else (output,)
        return sum(o.float().square().mean() for o in outputs if o.is_floating_point())  # put your own loss here

    torch_stage = [pipeline_stage(stage, device) for stage in mine]
    if len(mine) == 1:
        kind = ScheduleGPipe if PLAN.schedule == "gpipe" else Schedule1F1B
        schedule = kind(torch_stage[0], PLAN.num_microbatches, loss_fn=loss_fn)
    else:
        schedule = ScheduleInterleaved1F1B(torch_stage, PLAN.num_microbatches, loss_fn=loss_fn)
    is_first, is_last = mine[0].index == 0, mine[-1].is_last
    losses = []
    target = torch.zeros(PLAN.num_microbatches, device=device) if is_last else None  # the target that loss_fn is given
    schedule.step(*([t.to(device) for t in batch] if is_first else []), target=target, losses=losses)
    sum_tied_gradients(mine)  # before the step of each rank's optimizer
    if is_last:
        print(f"loss {{torch.stack(losses).mean():.6f}}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
'''


def torch_script(plan: Plan, model: str | None) -> str:
    """The program as text.

    Raises:
        ConfigError: no model is named.
        PlanError: the plan recomputes activations or has replicas, which the program does not set up.
    """
    if model is None:
        raise ConfigError(
            "no model",
            expected="the model that was planned, whose weights the stages hold",
            where="export --to torch",
            remedy="add --model file.py:factory",
        )
    if any(stage.recompute for stage in plan.stages) or plan.data_parallel > 1:
        raise PlanError(
            "a plan that recomputes activations" if plan.data_parallel == 1 else f"{plan.data_parallel} replicas",
            expected="stages alone",
            where="export --to torch",
            remedy="plan without them; wrap the exported modules in checkpoint or DistributedDataParallel yourself",
        )
    return TEMPLATE.format(
        hash=plan.plan_hash,
        stages=plan.num_stages,
        ranks=plan.num_ranks or plan.num_stages,
        count=plan.num_microbatches,
        model=model,
        plan=json.dumps(plan.to_json()),
    )

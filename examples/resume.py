# torchrun --nproc-per-node 2 --max-restarts 3 examples/resume.py --crash
"""The GPT of `train_gpt.py`, with checkpoints: a rank that is killed costs the steps since the last one, and nothing
else.

torchrun starts all ranks again; they go on from the newest whole checkpoint and end with the weights of a run in which
nothing happened, bit for bit (`--weights` writes them). `--crash` has one rank kill itself at a random step of the
first attempt. SIGTERM, as a scheduler sends it before it takes the machine away, lets the ranks finish the step, save,
and exit with 0.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
from functools import partial
from pathlib import Path

import torch
from train_gpt import GPT, batch_of, standard_library

import autopipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--checkpoints", type=Path, default=Path("resume-checkpoints"))
    parser.add_argument("--weights", type=Path, default=None)
    parser.add_argument("--crash", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    data = standard_library()
    example = batch_of(data, options.batch, torch.Generator().manual_seed(0))
    engine = autopipe.pipeline(
        GPT(width=options.width),
        example,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        data_parallel=1,
        num_microbatches=8,
        seed=0,
    )
    if any(options.checkpoints.glob("step-*")):
        engine.load_checkpoint(options.checkpoints)
        if engine.is_first_rank:
            print(f"goes on after step {engine.steps}", flush=True)
    engine.save_on_sigterm(options.checkpoints, keep=2)

    last_rank = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    crash_at = random.randrange(1, options.steps) if options.crash and first_attempt and last_rank else None
    while engine.steps < options.steps:
        if engine.steps == crash_at:
            print(f"is killed after step {engine.steps}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        ids, labels = batch_of(data, options.batch, torch.Generator().manual_seed(engine.steps))
        loss = engine.train_batch(ids.to(engine.device), labels.to(engine.device))
        if engine.steps % options.save_every == 0:
            engine.save_checkpoint(options.checkpoints, keep=2)
            if engine.is_first_rank:
                print(f"step {engine.steps:4d}  loss {loss:.3f} nats per byte, saved", flush=True)
    weights = engine.state_dict()
    if options.weights is not None and engine.is_first_rank:
        torch.save(weights, options.weights)
    engine.close()


if __name__ == "__main__":
    main()

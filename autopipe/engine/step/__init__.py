"""One call, executed: micro-batches and actions become gradients, losses or outputs. Read `runner.py` first."""

"""Batches become training steps: `Engine` runs a planned model over the ranks of a launch. Read `engine.py` first."""

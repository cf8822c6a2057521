"""Ranks: a launch becomes a `Context` and a (data, pipeline) mesh of processes. Read `context.py` first."""

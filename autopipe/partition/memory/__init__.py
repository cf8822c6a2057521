"""Bytes of a stage: an assignment becomes the memory of each stage, by one formula. Read `model.py` first."""

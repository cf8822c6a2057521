"""A model and its first batch become a `Prepared` engine: captured, planned, placed. Read `first_batch.py` first."""

"""What `benchmarks/engine.py` compares: the same stages under autopipe, torch's Schedule1F1B and DeepSpeed's pipeline
engine."""

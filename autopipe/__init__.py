"""Pipeline parallelism for any PyTorch model, unchanged."""

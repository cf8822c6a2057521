"""Profiles any `torch.fx.GraphModule`, node by node."""

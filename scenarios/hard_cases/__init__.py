"""Models of ordinary research code that are hard to turn into a graph: (model, args, kwargs) by name."""

from scenarios.hard_cases import autograd, calls, operators, parameters, values, writes  # noqa: F401 (each registers its cases)
from scenarios.hard_cases.registry import CASES, WIDTH, Net
from scenarios.hard_cases.values import Detector, Experts, OneStageDetector, ReadsValue, Speech

__all__ = ["CASES", "WIDTH", "Detector", "Experts", "Net", "OneStageDetector", "ReadsValue", "Speech"]

"""The named errors of autopipe, one class for each phase; each says what was got, what was expected, where, and the
remedy."""

from profiler.errors import DescribedError as AutopipeError
from profiler.errors import ProfileError

__all__ = [
    "AutopipeError",
    "CaptureError",
    "CheckpointError",
    "ClusterError",
    "ConfigError",
    "EngineError",
    "PartitionError",
    "PlanError",
    "ProfileError",
    "ScheduleError",
]


class CaptureError(AutopipeError):
    """The model could not be captured as a graph, or the captured graph does not compute what the model computes."""


class PartitionError(AutopipeError, ValueError):
    """No partition satisfies what was asked for."""


class PlanError(AutopipeError, ValueError):
    """A plan file is not valid, or does not belong to this model."""


class EngineError(AutopipeError, RuntimeError):
    """A training or evaluation step failed on some rank."""


class ScheduleError(EngineError):
    """A schedule would lose a tensor, use one before it arrives, or deadlock; found before the first step runs."""


class CheckpointError(AutopipeError):
    """A checkpoint could not be written or read."""


class ConfigError(AutopipeError, ValueError):
    """An argument of the public API or the command line has a wrong value."""


class ClusterError(AutopipeError, ValueError):
    """A description of devices and links is not valid."""

"""Pipeline parallelism for any PyTorch model, unchanged."""

from autopipe import _own_profiler as _own_profiler  # isort: skip (it is checked before anything imports it)
from autopipe._version import __version__ as __version__
from autopipe.api import pipeline
from autopipe.capture import Captured, capture
from autopipe.cluster import Cluster
from autopipe.config import PipelineConfig
from autopipe.engine.engine import Engine
from autopipe.errors import (
    AutopipeError,
    CaptureError,
    CheckpointError,
    ClusterError,
    ConfigError,
    EngineError,
    PartitionError,
    PlanError,
    ProfileError,
)
from autopipe.partition import Constraints, partition
from autopipe.plan import Plan, StagePlan
from autopipe.simulate import Timeline, simulate
from autopipe.stages import StageModule, build_stage

__all__ = [
    "AutopipeError",
    "CaptureError",
    "Captured",
    "CheckpointError",
    "Cluster",
    "ClusterError",
    "ConfigError",
    "Constraints",
    "Engine",
    "EngineError",
    "PartitionError",
    "PipelineConfig",
    "Plan",
    "PlanError",
    "ProfileError",
    "StageModule",
    "StagePlan",
    "Timeline",
    "build_stage",
    "capture",
    "partition",
    "pipeline",
    "simulate",
]

"""Devices as published, and the share of their peak rates that kernels of each class reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from profiler.errors import ProfileError
from profiler.records import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """The share of the published peak that is reached, from 0 to 1, by operator class, and the floor of one operator.

    Attributes:
        matmul: of the FLOP rate, in large matrix multiplications.
        convolution: of the FLOP rate, in convolutions.
        attention: of the FLOP rate, in fused attention.
        memory: of the memory bandwidth, in everything else.
        launch_us: least time of one operator: starting a kernel from eager PyTorch.
    """

    matmul: float
    convolution: float
    attention: float
    memory: float
    launch_us: float


_TERA, _GIGA = 10**12, 2**30


def _spec(name: str, memory_gib: int, tflops: Mapping[str, float], gb_per_s: float, source: str) -> DeviceSpec:
    return DeviceSpec(
        name=name,
        memory_bytes=memory_gib * _GIGA,
        flops={k: v * _TERA for k, v in tflops.items()},
        bytes_per_s=gb_per_s * 1e9,
        source=source,
    )


def _hopper(tf32: float = 494.7, dense16: float = 989.4) -> dict[str, float]:
    return {"float64": 66.9, "float32": 66.9, "tf32": tf32, "bfloat16": dense16, "float16": dense16, "float8": 1978.9}


DEVICES: dict[str, DeviceSpec] = {
    # Dense rates: the data sheets of NVIDIA print twice these for the matrix formats ("with sparsity").
    "h100": _spec("h100", 80, _hopper(), 3350, "https://www.nvidia.com/en-us/data-center/h100/ (SXM)"),
    "h200": _spec("h200", 141, _hopper(), 4800, "https://www.nvidia.com/en-us/data-center/h200/ (SXM)"),
    "a100": _spec(
        "a100",
        80,
        {"float64": 19.5, "float32": 19.5, "tf32": 156, "bfloat16": 312, "float16": 312},
        2039,
        "https://www.nvidia.com/en-us/data-center/a100/ (80 GB SXM)",
    ),
    "l40s": _spec(
        "l40s",
        48,
        {"float64": 1.4, "float32": 91.6, "tf32": 183, "bfloat16": 362, "float16": 362, "float8": 733},
        864,
        "https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    "mi300x": _spec(
        "mi300x",
        192,
        {"float64": 163.4, "float32": 163.4, "tf32": 653.7, "bfloat16": 1307.4, "float16": 1307.4, "float8": 2614.9},
        5300,
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html",
    ),
    # 64 cores × 2.45 GHz × 32 (AVX2: two fused multiply-adds of 8 floats a cycle); 8 channels of DDR4-3200.
    "cpu": _spec(
        "cpu",
        256,
        {"float64": 2.5, "float32": 5.0, "tf32": 5.0, "bfloat16": 5.0, "float16": 5.0},
        204.8,
        "https://www.amd.com/en/products/processors/server/epyc/7003-series.html (EPYC 7763, one socket)",
    ),
}

# matmul: large bf16 products reach 70-75 % on Hopper and Ampere and about half of the peak on MI300X (AMD, "Measuring
#   Max-Achievable FLOPs, part 2", rocm.blogs.amd.com). attention: FlashAttention-2 reaches 50-73 % on A100 (Dao, 2023)
#   and 35 % on H100 (Shah et al., FlashAttention-3, 2024). memory: 80-90 % in streaming kernels (BabelStream).
#   launch: a few microseconds from eager PyTorch. convolution, l40s and cpu: our assumption, by analogy.
_EFFICIENCIES = {
    "h100": Efficiency(matmul=0.70, convolution=0.50, attention=0.35, memory=0.80, launch_us=4.0),
    "h200": Efficiency(matmul=0.70, convolution=0.50, attention=0.35, memory=0.80, launch_us=4.0),
    "a100": Efficiency(matmul=0.75, convolution=0.55, attention=0.55, memory=0.80, launch_us=4.0),
    "l40s": Efficiency(matmul=0.65, convolution=0.50, attention=0.45, memory=0.75, launch_us=4.0),
    "mi300x": Efficiency(matmul=0.50, convolution=0.35, attention=0.25, memory=0.75, launch_us=6.0),
    "cpu": Efficiency(matmul=0.70, convolution=0.50, attention=0.40, memory=0.60, launch_us=2.0),
}
_DEFAULT = Efficiency(matmul=0.65, convolution=0.45, attention=0.35, memory=0.75, launch_us=4.0)


def find_spec(device: str | DeviceSpec) -> DeviceSpec:
    """The published figures of a device.

    Raises:
        ProfileError: a name that is not known, or a spec whose rates are not positive.
    """
    if isinstance(device, DeviceSpec):
        if not (device.bytes_per_s > 0 and device.flops and all(f > 0 for f in device.flops.values())):
            raise ProfileError(
                f"the device {device.name!r} with bytes_per_s={device.bytes_per_s}, flops={dict(device.flops)}",
                expected="positive rates, and at least one dtype",
                where="device",
                remedy="give the published rates, in operations and bytes a second",
            )
        return device
    found = DEVICES.get(str(device).lower())
    if found is None:
        raise ProfileError(
            f"device {device!r}",
            expected=f"one of {', '.join(DEVICES)}",
            where="device",
            remedy="name one of these, or give a DeviceSpec with its published rates",
        )
    return found


def efficiency_of(spec: DeviceSpec) -> Efficiency:
    """The shares of peak of a device; those of a middling GPU where the device is not one of ours."""
    return _EFFICIENCIES.get(spec.name.lower(), _DEFAULT)

"""Peaks of GPUs from NVIDIA's data sheets: dense FLOP/s by precision, and memory bandwidth in bytes/s."""

DATA_SHEETS = {
    "NVIDIA B200": {"bf16": 2250e12, "tf32": 1125e12, "fp32": 75e12, "memory": 8.0e12},
    "NVIDIA H200": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "memory": 4.8e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "fp32": 51e12, "memory": 2.0e12},
    "NVIDIA H100": {"bf16": 989e12, "tf32": 494e12, "fp32": 67e12, "memory": 3.35e12},
    "NVIDIA A100-SXM4-80GB": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 2.039e12},
    "NVIDIA A100 80GB PCIe": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 1.935e12},
    "NVIDIA A100": {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12, "memory": 1.555e12},
    "NVIDIA L40S": {"bf16": 362e12, "tf32": 183e12, "fp32": 91.6e12, "memory": 0.864e12},
    "NVIDIA GeForce RTX 4090": {"bf16": 165e12, "tf32": 82.6e12, "fp32": 82.6e12, "memory": 1.008e12},
}
"""Peaks by the beginning of the device's name; the SXM version where the name does not say."""


def data_sheet_value(name: str, quantity: str) -> float | None:
    """Return a peak of the GPU's data sheet; None for an unknown GPU.

    Args:
        name: name of the GPU, as the driver reports it.
        quantity: ``fp32``, ``tf32`` or ``bf16`` (FLOP/s of dense products), or ``memory`` (bytes/s).
    """
    beginnings = [known for known in DATA_SHEETS if name.startswith(known)]
    return DATA_SHEETS[max(beginnings, key=len)].get(quantity) if beginnings else None

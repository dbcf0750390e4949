"""A check of the device before long work: a broken node fails here, in seconds and by name."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from wmdd.errors import WmddError
from wmdd.runtime.placement import choose_device, placement_of

if TYPE_CHECKING:
    import torch

_SIDE = {"cuda": 2048, "cpu": 256}
"""Rows and columns of the matrices that are multiplied, by type of device."""


class DeviceFault(WmddError):
    """The device of this process is missing or computes wrong values: the fault of the node, not of the run."""


def check_device(wanted: str, environment: Mapping[str, str] = os.environ) -> None:
    """Import torch, allocate matrices on the device, multiply them, and compare the product with exact values.

    Args:
        wanted: device as ``compute.device`` names it; ``cuda`` demands a GPU.
        environment: environment variables of the process.

    Raises:
        DeviceFault: one of these steps failed; the message names the node.
    """
    node = environment.get("SLURMD_NODENAME") or os.uname().nodename
    try:
        import torch

        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device(choose_device(wanted, placement_of(environment), visible))
        wrong = wrong_products(device)
    except (ImportError, MemoryError, OSError, RuntimeError, WmddError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DeviceFault(f"device check failed on {node}: {reason}") from error
    if wrong:
        raise DeviceFault(f"device check failed on {node}: {wrong} rows of a product are wrong on {device}")


def wrong_products(device: "torch.device") -> int:
    """Return the number of wrong rows of a matrix product on a device.

    The matrices hold small integers, so every precision, TF32 and bf16 included, gives the exact product.  Freivalds'
    test compares it with the CPU: A (B v) costs as little as the sum of a row.
    """
    import torch

    side = _SIDE[device.type]
    places = torch.arange(side * side)
    left, right = ((places * step % modulus).float().view(side, side) for step, modulus in ((7, 5), (11, 3)))
    vector = (torch.arange(side) % 13).double()
    product = (left.to(device) @ right.to(device)).cpu().double() @ vector
    return int((product != left.double() @ (right.double() @ vector)).sum())

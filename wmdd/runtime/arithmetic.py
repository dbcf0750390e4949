"""The arithmetic of results: derived from the config section ``compute`` and the device, applied, and recorded.

The same config may compute in bf16 on one machine and in fp32 on another.  Its fingerprint therefore does not cover
rounding.  The arithmetic is recorded next to the fingerprint, and results of two arithmetics are never combined.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from wmdd.config.schema import ComputeConfig
from wmdd.errors import InputError

if TYPE_CHECKING:
    import torch


ENGINE = 2
"""Version of the operations that make class statistics and images. Another version rounds differently. Its statistics,
checkpoints and unfinished run folders are not used."""


@dataclass(frozen=True)
class Hardware:
    """Capabilities of a device."""

    device: Literal["cpu", "cuda"]
    bf16: bool
    """Whether the device has bf16 instructions"""
    tf32: bool = False


@dataclass(frozen=True)
class Arithmetic:
    """How results are rounded."""

    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "tf32", "bf16"]
    """``fp32`` is IEEE single precision"""
    compile: bool
    """Whether steps are compiled with torch.compile"""
    deterministic: bool
    """Whether cuDNN uses only deterministic algorithms; always true on a CPU"""
    threads: int | None
    """Number of threads of each rank, which decides how a CPU splits its sums; None on a GPU"""

    @staticmethod
    def from_facts(facts: Mapping[str, Any] | None) -> "Arithmetic | None":
        """Return the arithmetic that ``facts`` has recorded; None for other content."""
        try:
            return Arithmetic(**(facts or {}))
        except TypeError:
            return None

    @property
    def facts(self) -> dict[str, Any]:
        """The arithmetic as files and digests contain it."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.precision} on {self.device}"]
        parts += [] if self.threads is None else [f"{self.threads} thread{'s' * (self.threads != 1)}"]
        parts += ["compiled"] * self.compile + ["not deterministic"] * (not self.deterministic)
        return ", ".join(parts)

    def keys_unlike(self, other: "Arithmetic") -> str:
        """Return the settings, such as ``compute.threads=2``, that turn ``other`` into this arithmetic."""
        mine, theirs = self.facts, other.facts
        unlike = [key for key, value in mine.items() if value != theirs[key] and value is not None]
        return " ".join(f"compute.{key}={str(mine[key]).lower()}" for key in unlike)


def resolve(compute: ComputeConfig, hardware: Hardware) -> Arithmetic:
    """Return the arithmetic of a config on a device.

    Raises:
        InputError: the config requires TF32, and the device has no TF32.
    """
    precision = compute.precision
    if precision == "tf32" and not hardware.tf32:
        raise InputError(
            f"compute.precision = tf32: this {hardware.device} device has no TF32 (NVIDIA GPUs have it from Ampere on);"
            " use fp32, bf16 or auto"
        )
    if precision == "auto":
        precision = "bf16" if hardware.bf16 else "fp32"
    cpu = hardware.device == "cpu"
    threads = compute.threads if cpu else None
    return Arithmetic(hardware.device, precision, compute.compile, cpu or compute.deterministic, threads)


def candidates(compute: ComputeConfig, *devices: Literal["cpu", "cuda"]) -> list[Arithmetic]:
    """Return every arithmetic that a config may have on devices of the given kinds (default: any kind)."""
    precisions = ("bf16", "fp32") if compute.precision == "auto" else (compute.precision,)
    found = []
    for device in devices or ("cpu", "cuda"):
        if compute.device == "auto" or compute.device.startswith(device):
            hardware = Hardware(device, bf16=True, tf32=device == "cuda")
            asked = [compute.replace({"precision": one}) for one in precisions]
            found += [resolve(one, hardware) for one in asked if one.precision != "tf32" or hardware.tf32]
    return found


def permits(compute: ComputeConfig, used: Arithmetic) -> bool:
    """Return whether a config may have this arithmetic on some machine."""
    return used in candidates(compute)


def hardware_of(device: "torch.device") -> Hardware:
    """Return the capabilities of a device.  A GPU must be the current device (``torch.cuda.set_device``)."""
    import torch

    if device.type != "cuda":
        return Hardware("cpu", native_bf16())
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Hardware("cuda", bf16, torch.cuda.get_device_capability(device) >= (8, 0))


def native_bf16() -> bool:
    """Return whether this CPU has bf16 instructions.  Without them bf16 is slower than fp32."""
    import torch

    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("avx512_bf16", False)


def switches(arithmetic: Arithmetic) -> dict[str, bool]:
    """Return the switches of ``torch.backends`` for an arithmetic.  By torch's defaults cuDNN would use TF32."""
    return {
        "cudnn.allow_tf32": arithmetic.precision == "tf32",
        "cuda.matmul.allow_tf32": arithmetic.precision == "tf32",
        "cudnn.deterministic": arithmetic.deterministic,
        "cudnn.benchmark": not arithmetic.deterministic,
    }


@contextmanager
def applied(arithmetic: Arithmetic) -> Iterator[None]:
    """Apply an arithmetic to torch in this process; restore torch's switches afterwards."""
    import torch

    with ExitStack() as stack:
        for name, wanted in switches(arithmetic).items():
            place, _, switch = name.rpartition(".")
            backend = torch.backends
            for part in place.split("."):
                backend = getattr(backend, part)
            stack.callback(setattr, backend, switch, getattr(backend, switch))
            setattr(backend, switch, wanted)
        yield

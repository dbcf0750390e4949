"""Files that are whole or absent: write to a temporary name, sync, rename; and their SHA-256."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wmdd.errors import WmddError

_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader sees the old file or the new one, never a part.

    Raises:
        WmddError: the disk is full, the quota is used up, or the folder cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = _NO_ROOM.get(error.errno or 0, error.strerror or str(error))
        raise WmddError(f"{path}: cannot be written: {reason}; what was finished before is kept") from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        WmddError: the file is absent or is not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise WmddError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WmddError(f"{path}: is not whole JSON ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors as safetensors, whole or not at all, and return the file's SHA-256."""
    import safetensors.torch

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(ready, dict(metadata) if metadata else None)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file onto the CPU.

    Raises:
        WmddError: the file is absent or damaged; the message names it.
    """
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise WmddError(f"{path}: no such file") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise WmddError(f"{path}: is not a whole safetensors file ({error})") from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form: what a fingerprint is made of."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()

"""Atomic files (write to a temporary name, sync, rename), file locks and digests."""

import errno
import hashlib
import json
import math
import mmap
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from wmdd.errors import InputError, Interrupted, WmddError

T = TypeVar("T")

FORMAT = 2
"""Version of all file formats and of all names made with ``digest``.  Files with another number, or none, belong to
another version of the package: they are recognized and never used."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

_NO_LINKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}

_NO_ROOM = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}


def write_bytes(path: Path, content: bytes, new: bool = False, sync: bool = True) -> None:
    """Write ``content`` so that a reader sees the old file or the new one, never a part.

    Args:
        path: path of the file.  Its folder is created if it is absent.
        content: content of the file.
        new: whether to refuse to replace an existing file.
        sync: whether the content must survive a crash of the machine.

    Raises:
        FileExistsError: ``new`` is true and the file exists.
        WmddError: the disk is full, the quota is used up, or the folder is not writable.  No partial file remains.
    """
    _write_whole(path, [content], new, sync)


def _write_whole(path: Path, chunks: Iterable[Any], new: bool, sync: bool) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        _put(temporary, path, new)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if new and isinstance(error, FileExistsError):
            raise
        reason = _NO_ROOM.get(error.errno or 0, error.strerror or str(error))
        raise WmddError(f"{path}: cannot be written: {reason}; earlier results are kept") from error
    except WmddError:  # a chunk could not be made
        temporary.unlink(missing_ok=True)
        raise


_ABANDONED_SECONDS = 3600.0
"""Seconds without a write after which a temporary file counts as abandoned: its process was killed."""


def sweep(*folders: Path) -> None:
    """Delete the abandoned temporary files of killed processes in some folders."""
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                    with suppress(OSError):
                        if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                            os.unlink(entry.path)


def _put(temporary: Path, path: Path, new: bool) -> None:
    """Rename a finished file.  With ``new``, refuse to replace an existing file."""
    if new:
        try:
            os.link(temporary, path)
            temporary.unlink()
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                raise FileExistsError(f"{path}: exists") from None
    os.replace(temporary, path)


def write_json(path: Path, value: Any, new: bool = False, sync: bool = True) -> None:
    """Write ``value`` as indented JSON, atomically (``write_bytes``)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), new, sync)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        WmddError: the file is absent or is not JSON; the message names the file.
    """
    try:
        return json.loads(_read(path, path.read_bytes))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WmddError(f"{path}: is not complete JSON ({error})") from error


def read_toml(place: Traversable, title: str) -> dict[str, Any]:
    """Read a TOML file.  Error messages call it ``title``.

    Raises:
        InputError: the file cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(place.read_text())
    except OSError as error:
        raise InputError(f"{title}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{title}: is not TOML: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors as a safetensors file, atomically, and return the file's SHA-256."""
    import safetensors.torch

    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(ready, dict(metadata) if metadata else None)
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def write_images(path: Path, shape: Sequence[int], parts: Iterable[Any]) -> None:
    """Write uint8 tensors, one after the other, as the tensor ``images`` of a safetensors file, atomically.

    Memory holds one part at a time.

    Args:
        path: path of the file.
        shape: shape of the whole tensor.
        parts: tensors of the rows, in order.

    Raises:
        WmddError: the disk is full or the folder is not writable. No partial file remains.
    """
    entry = {"dtype": "U8", "shape": list(shape), "data_offsets": [0, math.prod(shape)]}
    header = json.dumps({"images": entry}).encode()
    header += b" " * (-len(header) % 8)

    def chunks() -> Iterator[Any]:
        yield len(header).to_bytes(8, "little") + header
        for part in parts:
            yield part.contiguous().numpy().data

    _write_whole(path, chunks(), new=False, sync=True)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file onto the CPU.

    Raises:
        WmddError: the file is absent or damaged; the message names the file.
    """
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(_read(path, path.read_bytes))
    except safetensors.SafetensorError as error:
        raise WmddError(f"{path}: is not a complete safetensors file ({error})") from error


def map_tensors(path: Path) -> dict[str, Any]:
    """Memory-map a safetensors file, and return its tensors (``map_and_hash``)."""
    return _tensors_of(_map(path), path)


def map_and_hash(path: Path) -> tuple[dict[str, Any], str]:
    """Memory-map a safetensors file, which is opened once.  Return its tensors and the file's SHA-256.

    The processes of a machine share the pages of the file.  A tensor that is changed gets a private copy of its pages;
    the file never changes.

    Raises:
        WmddError: the file is absent or damaged; the message names the file.
    """
    content = _map(path)
    return _tensors_of(content, path), hashlib.sha256(content).hexdigest()


def _map(path: Path) -> mmap.mmap:
    def opened() -> mmap.mmap:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    try:
        return _read(path, opened)
    except ValueError as error:  # it is empty
        raise WmddError(f"{path}: is not a complete safetensors file ({error})") from error


def _tensors_of(content: mmap.mmap, path: Path) -> dict[str, Any]:
    """Return the tensors of a mapped safetensors file, as views of the mapping."""
    import torch

    found = {}
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name == "__metadata__":
                continue
            shape, kind = entry["shape"], getattr(torch, _TYPES[entry["dtype"]])
            low, high = (start + offset for offset in entry["data_offsets"])
            if high > len(content):
                raise ValueError("it ends too early")
            count = math.prod(shape)
            flat = (
                torch.frombuffer(content, dtype=kind, count=count, offset=low) if count else torch.empty(0, dtype=kind)
            )
            found[name] = flat.reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WmddError(f"{path}: is not a complete safetensors file ({error})") from error
    return found


_TYPES = {
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, or {} if the file is absent or damaged.

    Raises:
        WmddError: the file system reports an error, so the file may exist.
    """
    import safetensors

    def opened() -> dict[str, str]:
        try:
            with open(path, "rb"):  # safetensors reports every file that it cannot open as absent
                pass
            with safetensors.safe_open(path, "pt") as file:
                return dict(file.metadata() or {})
        except (FileNotFoundError, safetensors.SafetensorError):
            return {}

    return _read(path, opened)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal digits.

    Raises:
        WmddError: the file cannot be read.
    """

    def hashed() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _read(path, hashed)


EXPECT_SECONDS = 90.0
"""Seconds that a finished file may stay invisible: an NFS client caches the absence of a name for up to 60 seconds."""


def expect(paths: Iterable[Path], stop: Callable[[], bool] = lambda: False, seconds: float = EXPECT_SECONDS) -> None:
    """Wait until this machine sees files that another machine has finished.  Return after ``seconds`` in any case.

    Listing the folders makes an NFS client ask the server again.

    Raises:
        Interrupted: a stop was requested.
    """
    deadline = time.monotonic() + seconds
    missing = _absent(paths)
    while missing and time.monotonic() < deadline:
        for folder in {path.parent for path in missing}:
            with suppress(OSError):
                os.listdir(folder)
        missing = [path for path in missing if not path.exists()]
        if missing and stop():
            raise Interrupted(f"stopped while waiting for {missing[0]}")
        if missing:
            time.sleep(max(0.0, min(0.5, deadline - time.monotonic())))


def _absent(paths: Iterable[Path]) -> list[Path]:
    """Return the paths that do not exist.  The files of a folder cost one listing, not one request each."""
    by_folder: dict[Path, list[Path]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, []).append(path)
    missing = []
    for folder, own in by_folder.items():
        if len(own) <= 2:
            missing += [path for path in own if not path.exists()]
            continue
        try:
            found = set(os.listdir(folder))
        except OSError:
            found = set()
        missing += [path for path in own if path.name not in found]
    return missing


@contextmanager
def locked(path: Path, stop: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Hold a lock file: one process of a machine works at a time.

    The kernel frees the lock of a process that dies. Where the file system has no locks, no process waits: work may
    then be done twice, which writes the same bytes.

    Raises:
        Interrupted: a stop was requested while another process held the lock.
        WmddError: the file cannot be locked.
    """
    while (lock := try_lock(path, 0.5)) is None:
        if stop():
            raise Interrupted(f"stopped while waiting for another process to release {path}")
    try:
        yield
    finally:
        lock.release()


def try_lock(path: Path, seconds: float = 0.0) -> BaseFileLock | None:
    """Acquire a lock file.  Return it, or None if another process holds it.

    Args:
        path: path of the lock file.
        seconds: maximum wait for the other process, in seconds.

    Raises:
        WmddError: the file cannot be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive its owner on another machine
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise WmddError(f"{path}: cannot be locked: {error.strerror}") from error
    return lock


def _read(path: Path, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, which reads the file ``path``.

    Raises:
        WmddError: the file cannot be read; the message names it.
    """
    try:
        return _patiently(read)
    except OSError as error:
        raise WmddError(f"{path}: cannot be read: {error.strerror or error}") from error


def _patiently(read: Callable[[], T]) -> T:
    """Read with a few retries: a network file system reports ESTALE when another machine has just replaced the file."""
    for pause in (0.05, 0.2, 1.0):
        try:
            return read()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(pause)
    return read()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form.  Fingerprints are such digests."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

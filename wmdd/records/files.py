"""Files of records: read, appended to, written."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pydantic import ValidationError

from wmdd.errors import InputError, reason
from wmdd.records.schema import LINE, Line, Record, SpeedRecord
from wmdd.storage.files import write_bytes


def append(path: Path, record: Record | SpeedRecord) -> None:
    """Add one line to a file. The whole file is written again, so that a reader never sees half a line.

    One process writes a file: give each task a file of its own.

    Raises:
        WmddError: the file cannot be written.
    """
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    write_bytes(path, before + _line(record))


def write_records(path: Path, records: Iterable[Record | SpeedRecord]) -> None:
    """Write a file of records, whole or not at all.

    Raises:
        WmddError: the file cannot be written.
    """
    write_bytes(path, b"".join(_line(record) for record in records))


def read_records(
    path: Path,
    kind: type[Line] = Record,  # type: ignore[assignment]  # a default narrower than its type variable
) -> tuple[list[Line], list[str]]:
    """Read a file of records, or all files ``records/*.jsonl`` in and below a folder, in the order of their names.

    Args:
        path: file or folder.
        kind: accuracies or speeds; the others are passed over.

    Returns:
        The records, and for each line or file that could not be read one sentence ``file:line: reason``.

    Raises:
        InputError: there is no such file or folder.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    files = [path] if path.is_file() else sorted(record_files(path))
    records: list[Line] = []
    problems: list[str] = []
    for file in files:
        try:
            lines = file.read_bytes().split(b"\n")
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
            continue
        if not lines[-1]:  # what follows the last line's end
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                record = LINE.validate_json(line)
            except ValidationError as error:
                reason = _reason(error) if line.strip() else "the line is empty"
                problems.append(f"{file}:{number}: {reason}")
            else:
                if isinstance(record, kind):
                    records.append(record)
    return records, problems


_WITHOUT_RECORDS = {"blocks", "groups", "students", "labels", "progress", "locks", "logs", "slurm", "superseded"}
"""Folders of a run that hold thousands of files and no records."""


def record_files(path: Path) -> Iterator[Path]:
    """Yield the files ``records/*.jsonl`` in and below a folder. The large folders of runs are not listed."""
    for folder, inner, names in os.walk(path):
        if "config.json" in names:  # a run
            inner[:] = [name for name in inner if name not in _WITHOUT_RECORDS]
        if os.path.basename(folder) == "records":
            yield from (Path(folder, name) for name in names if name.endswith(".jsonl"))


def _line(record: Record | SpeedRecord) -> bytes:
    return record.model_dump_json().encode() + b"\n"


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])  # after the kind of the line
    return f"{where}: {reason(first)}" if where else reason(first)

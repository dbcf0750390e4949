"""A run that does not fit the memory of a node is refused before any work."""

from pathlib import Path

import pytest

from wmdd import pipeline
from wmdd.config.schema import Config
from wmdd.errors import InputError
from wmdd.runtime.memory import free_memory

GROUPS = {
    "v2": ("0::/job/step\n", "sys/fs/cgroup/job", ("memory.max", "memory.current", "inactive_file")),
    "v1": (
        "4:memory:/job/step\n0::/\n",
        "sys/fs/cgroup/memory/job",
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
}


@pytest.mark.parametrize("version", GROUPS)
@pytest.mark.parametrize(("limit", "free"), [("6000", 6000 - 5000 + 3000), ("max", 8192), ("9" * 19, 8192)])
def test_free_memory_is_that_of_the_job(tmp_path: Path, version: str, limit: str, free: int) -> None:
    membership, folder, (maximum, used, cached) = GROUPS[version]
    group = tmp_path / folder
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(membership)
    (group / "step").mkdir(parents=True)  # a level without files: only its parent limits memory
    (group / maximum).write_text(f"{limit}\n")
    (group / used).write_text("5000\n")
    (group / "memory.stat").write_text(f"active_file 7\n{cached} 3000\n")
    assert free_memory(tmp_path) == free


@pytest.mark.parametrize(
    ("blocks", "remedy"), [(1, "use more blocks, or fewer ranks on a node"), (4, "lower data.memory_gb")]
)
def test_a_run_that_does_not_fit_is_refused_with_its_size_and_the_remedy(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, remedy: str
) -> None:
    monkeypatch.setenv("WMDD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pipeline, "free_memory", lambda: 20_000)
    large = tiny.replace({"ipc": 140 if blocks == 1 else 2, "blocks": blocks, "synthesis.classes_per_group": 1})
    message = r"needs 0.0 GB of memory on this node, .* GB of it for .*; 0.0 GB are free; "
    with pytest.raises(InputError, match=message + remedy):
        pipeline.run(large, tmp_path / "run", share=pipeline.Share(("teacher", "distill")))
    assert not (tmp_path / "cache" / "teachers").exists()

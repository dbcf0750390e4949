"""The self-test of every node of a partition: one job and one result a node, and the names of those that failed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from slurm.cli import app
from slurm.local_cluster import LocalCluster
from slurm.profile import Profile, load_profile
from slurm.selftest import nodes_of_partition, resources, script, standing
from wmdd.errors import InputError

from .conftest import ask, node_down, profile, wait

STUB = """#!/bin/sh
# Stands for the interpreter: the last word is the JSON file of the node.
for file; do :; done
case $SLURMD_NODENAME in
    *.12) state=fail code=1 ;;
    *.13) exit 3 ;;
    *) state=pass code=0 ;;
esac
echo "{\\"seconds\\": 1, \\"rows\\": [{\\"name\\": \\"device\\", \\"state\\": \\"$state\\"}]}" > "$file"
exit $code
"""


def partition(name: str | None) -> Profile:
    return profile(partition=name)


def test_the_nodes_are_those_of_the_profiles_partition_or_of_the_default_one() -> None:
    listing = "main*|n1|idle\nmain*|n2|mixed\ngpu|n2|mixed\ngpu|n3|down*\n"
    assert nodes_of_partition(listing, partition(None)) == {"n1": "idle", "n2": "mixed"}
    assert nodes_of_partition(listing, partition("gpu")) == {"n2": "mixed", "n3": "down*"}
    with pytest.raises(InputError, match="partition gpuu: sinfo lists no node"):
        nodes_of_partition(listing, partition("gpuu"))


def test_a_job_takes_all_gpus_of_its_node_in_one_task(tmp_path: Path) -> None:
    known = load_profile("a100")
    text = script(known, "n7", tmp_path)
    assert resources(known).gpus == 4 and "#SBATCH --gpus-per-node=4" in text and "#SBATCH --nodelist=n7" in text
    assert "#SBATCH --ntasks-per-node=1" in text and f"--device cuda --json {tmp_path}/nodes/n7.json" in text
    assert "--device cpu" in script(load_profile("cpu"), "n7", tmp_path)


@pytest.mark.parametrize(
    "result, job, log, state",
    [
        ({"seconds": 60.0, "rows": [{"name": "a", "state": "pass"}]}, None, None, "passed"),
        ({"seconds": 60.0, "rows": [{"name": "a", "state": "pass"}]}, "running", None, "passed"),
        ({"seconds": 60.0, "rows": [{"name": "a", "state": "fail"}]}, None, None, "failed"),
        (None, "pending", Path("log"), "waiting"),
        (None, None, Path("log"), "lost"),
        (None, None, None, "absent"),
    ],
)
def test_where_a_node_stands(result: dict[str, object] | None, job: str | None, log: Path | None, state: str) -> None:
    found = standing("n1", result, job, "down", log)
    assert found.state == state and found.bad == (state in ("failed", "lost"))


def test_every_node_is_tested_once_and_the_same_command_names_those_that_failed(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    own = tmp_path / "narrow.toml"
    own.write_text(f'gpus_per_rank = 0\ncpus_per_rank = 1\nmemory_gb = 1\nminutes = 10\npython = "{stub}"\n')
    words = ["submit", "--selftest", "--profile", str(own), "--out", str(tmp_path / "out")]
    with node_down(cluster.node_names[3]):
        first = CliRunner().invoke(app, words)
        assert first.exit_code == 0 and "4 nodes" in first.stdout and "1 absent" in first.stdout, first.output
        wait(lambda: not ask("squeue", "-h"), 60, "the jobs end")
        second = CliRunner().invoke(app, words)
    assert second.exit_code == 1, second.output
    for part in ("1 failed", "1 lost", "1 passed", "1 absent", 'exclude = "127.0.0.12,127.0.0.13"'):
        assert part in second.stdout, second.output
    assert ask("squeue", "-h") == "", "a node was tested again"


def test_the_selftest_takes_no_config_and_a_run_needs_one() -> None:
    for words, said in (
        (["submit", "digits", "--selftest", "--profile", "cpu"], "--selftest takes no CONFIG: leave out digits"),
        (["submit", "--profile", "cpu"], "CONFIG is missing"),
    ):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, InputError) and said in str(done.exception)

"""The throw-away cluster: it boots, says what is wrong, and touches nothing that is not its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slurm.cli import app
from slurm.local_cluster import LocalCluster, missing_programs, stop
from wmdd.errors import InputError

from .conftest import require


@pytest.mark.slow
@pytest.mark.slurm
def test_start_and_stop_leave_nothing_behind() -> None:
    require()
    root = Path(tempfile.mkdtemp(prefix="wmdd-test-", dir="/tmp")) / "c"
    told = CliRunner().invoke(app, ["local", "start", "--root", str(root), "--nodes", "2"], catch_exceptions=False)
    try:
        assert told.output == f"export SLURM_CONF={root}/etc/slurm.conf\n"
        daemons = [pid for pid, _ in json.loads((root / "processes.json").read_text()).values()]
        assert len(daemons) == 4
        env = os.environ | {"SLURM_CONF": f"{root}/etc/slurm.conf"}
        nodes = subprocess.run(
            ["/usr/bin/env", "sinfo", "-h", "-N", "-o", "%N"], env=env, capture_output=True, text=True
        )
        assert nodes.stdout.split() == ["127.0.0.11", "127.0.0.12"]
        # Whoever is not this user's process on this machine cannot reach it: everything listens on the loopback.
        listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
        port = int(next(line for line in (root / "etc/slurm.conf").read_text().split() if "ctldPort" in line)[14:])
        own = {line.split()[1] for line in listening if line.split()[3] == "0A"}
        assert [place for place in own if int(place[9:], 16) in range(port, port + 20)]
        assert all(place.startswith("0100007F") for place in own if int(place[9:], 16) in range(port, port + 20))
        with pytest.raises(InputError, match="holds a cluster already; stop it with: wmdd slurm local stop"):
            LocalCluster(root).start()
    finally:
        assert CliRunner().invoke(app, ["local", "stop", "--root", str(root)]).exit_code == 0
    assert not root.exists()
    root.parent.rmdir()
    assert not [pid for pid in daemons if Path(f"/proc/{pid}/cmdline").exists() and _state(pid) != "Z"]
    assert CliRunner().invoke(app, ["local", "stop", "--root", str(root)]).exit_code == 0


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_that_has_inherited_a_number_is_not_touched(tmp_path: Path) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "processes.json").write_text(json.dumps({"slurmctld": [stranger.pid, 12345]}))
        stop(tmp_path / "c")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_is_missing_is_named_with_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slurm.local_cluster._SBIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slurmctld" in missing_programs()
    with pytest.raises(InputError, match=r"slurmctld.* not installed; on Debian: apt-get install .*munge$"):
        LocalCluster(tmp_path / "c").start()
    with pytest.raises(InputError, match="mariadb-server-core"):
        LocalCluster(tmp_path / "c", accounting=True).start()


def test_a_long_path_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    require()
    with pytest.raises(InputError, match="too long for sockets; use --root"):
        LocalCluster(tmp_path / ("x" * 60)).start()
    assert not list(tmp_path.iterdir())

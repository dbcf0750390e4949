"""A throw-away SLURM cluster on this machine: real daemons, virtual nodes, one folder, no root needed.

Everything (configuration, keys, sockets, state, logs) lies below one folder and listens on the loopback interface only.
The nodes are called 127.0.0.11 and so on, names that resolve without an entry in ``/etc/hosts``, and all run here.  It
is made to try submissions on a laptop and to test them: scheduling, dependencies, requeues and failures are SLURM's
own; cgroups, isolation of GPUs (they are stand-ins) and users are not.

A process is known by its id and its start time, and only processes that this module started are ever signalled.
"""

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wmdd.errors import InputError, WmddError
from wmdd.storage.files import read_json, write_json

PACKAGES = "slurmctld slurmd slurm-client munge"
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server-core mariadb-client-core"
_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo")
_ACCOUNTING_DAEMONS = ("slurmdbd", "sacctmgr", "mariadbd", "mariadb-install-db", "mariadb")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/ptmx")
"""Stand-ins for GPUs: SLURM wants distinct character devices that exist."""
_MAX_ROOT_LENGTH = 60
"""Unix sockets below the folder may have 107 characters."""
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def default_root() -> Path:
    """Return where ``wmdd slurm local`` keeps its cluster: one a user, under ``/tmp`` since socket paths are short."""
    return Path("/tmp") / f"wmdd-slurm-{os.getuid()}"  # noqa: S108


def missing_programs(accounting: bool = False) -> list[str]:
    """Return the programs that are not installed and that a cluster needs."""
    wanted = _DAEMONS + (_ACCOUNTING_DAEMONS if accounting else ())
    return [name for name in wanted if shutil.which(name, path=_search_path()) is None]


@dataclass(frozen=True)
class LocalCluster:
    """A cluster in a folder; the folder says whether it runs."""

    root: Path
    nodes: int = 4
    cpus: int = 8
    """Claimed by each node, whatever the machine has"""
    memory_mb: int = 16000
    """Claimed by each node"""
    gpus: int = 2
    """Stand-ins on each node"""
    accounting: bool = False
    """Start slurmdbd on a MariaDB of its own, so that sacct works"""
    max_array: int = 1001
    """MaxArraySize, SLURM's own default"""

    @property
    def node_names(self) -> list[str]:
        """Names of the nodes."""
        return [f"127.0.0.{11 + index}" for index in range(self.nodes)]

    @property
    def conf(self) -> Path:
        """The file that ``SLURM_CONF`` has to name."""
        return self.root / "etc" / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the cluster."""
        return {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Boot the cluster and wait until every node is idle; about two seconds, ten with accounting.

        Raises:
            InputError: programs are missing, the folder is in use or its path is too long.
            WmddError: a daemon does not start; the message quotes its log.
        """
        if absent := missing_programs(self.accounting):
            packages = PACKAGES + (f" {ACCOUNTING_PACKAGES}" if self.accounting else "")
            raise InputError(
                f"{', '.join(absent)}: not installed; on Debian: apt-get install --no-install-recommends {packages}"
            )
        if len(str(self.root)) > _MAX_ROOT_LENGTH:
            raise InputError(
                f"{self.root}: longer than {_MAX_ROOT_LENGTH} characters, too long for sockets; use --root"
            )
        if self.conf.exists():
            raise InputError(f"{self.root}: holds a cluster already; stop it with: wmdd slurm local stop")
        if not 1 <= self.nodes <= 200 or not 0 <= self.gpus <= len(_DEVICES):
            raise InputError(f"a local cluster has 1 to 200 nodes and 0 to {len(_DEVICES)} GPUs a node")
        try:
            self._boot()
        except BaseException:
            stop(self.root)
            raise

    def stop(self) -> None:
        """End the jobs and the daemons of the cluster and delete its folder."""
        stop(self.root)

    def _boot(self) -> None:
        for name in ("etc", "run", "log", "state"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for node in self.node_names:
            (self.root / "spool" / node).mkdir(parents=True)
        self.root.chmod(0o755)
        port = _free_ports(13 + self.nodes)
        self._configure(port)
        self._start_munge()
        if self.accounting:
            self._start_accounting(port)
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for node in self.node_names:
            self._daemon(f"slurmd.{node}", ["slurmd", "-D", "-N", node])
        self._await("slurmctld", f"idle {self.nodes}", ["sinfo", "-h", "-o", "%T %D"])

    def _configure(self, port: int) -> None:
        user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
        munge = self.root / "run" / "munge.sock"
        lines = f"""
            ClusterName=wmdd
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={port}
            SlurmUser={user}
            SlurmdUser={user}
            AuthType=auth/munge
            CredType=cred/munge
            # A requeued job waits until its old credential has expired: 120 s by default.
            AuthInfo=cred_expire=5,socket={munge}
            CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
            StateSaveLocation={self.root}/state
            SlurmdSpoolDir={self.root}/spool/%n
            SlurmctldPidFile={self.root}/run/slurmctld.pid
            SlurmdPidFile={self.root}/run/slurmd.%n.pid
            PlugStackConfig={self.root}/etc/plugstack.conf
            MailProg=/bin/true
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            SwitchType=switch/none
            MpiDefault=none
            JobAcctGatherType=jobacct_gather/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU_Memory
            SlurmdParameters=config_overrides
            SchedulerType=sched/backfill
            SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
            GresTypes=gpu
            ReturnToService=2
            KillWait=5
            DefMemPerCPU=500
            MaxArraySize={self.max_array}
            MaxJobCount=20000
            MinJobAge=3600
            # Job numbers never come twice, so that folders of an earlier cluster's jobs are not taken for new ones.
            FirstJobId={int(time.time()) % 600000 * 100 + 1}
            InactiveLimit=0
            SlurmdTimeout=30
        """
        conf = [line.strip() for line in lines.strip().splitlines()]
        if self.accounting:
            conf += [
                "AccountingStorageType=accounting_storage/slurmdbd",
                "AccountingStorageHost=127.0.0.1",
                f"AccountingStoragePort={port + 1}",
                "AccountingStorageTRES=gres/gpu",
                "AccountingStorageEnforce=limits",
                f"AccountingStoragePass={munge}",
            ]
        last = port + 10 + self.nodes - 1
        conf += [
            f"NodeName=127.0.0.[11-{10 + self.nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{port + 10}-{last}]"
            f" CPUs={self.cpus} RealMemory={self.memory_mb} Gres=gpu:{self.gpus} State=UNKNOWN",
            "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
        ]
        self.conf.write_text("\n".join(conf) + "\n")
        (self.root / "etc" / "plugstack.conf").touch()
        devices = ",".join(_DEVICES[: self.gpus])
        gres = f"Name=gpu File={devices}\n" if self.gpus else ""
        (self.root / "etc" / "gres.conf").write_text("AutoDetect=off\n" + gres)

    def _start_munge(self) -> None:
        run = self.root / "run"
        key = run / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        places = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{name}={run / file}" for name, file in places.items()]
        log = self.root / "log" / "munged.log"
        self._daemon("munged", ["munged", "--foreground", "--force", f"--log-file={log}", *options])
        _wait(lambda: (run / "munge.sock").exists(), 10, f"munged does not start; see {log}")

    def _start_accounting(self, port: int) -> None:
        data, sock, user = self.root / "db", self.root / "run" / "mysql.sock", getpass.getuser()
        data.mkdir()
        common = ["--no-defaults", f"--user={user}", f"--datadir={data}"]
        self._call(["mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db"])
        network = ["--skip-networking=0", "--bind-address=127.0.0.1", f"--port={port + 2}", f"--socket={sock}"]
        small = ["--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"]
        pid = f"--pid-file={self.root / 'run' / 'mariadbd.pid'}"
        self._daemon("mariadbd", ["mariadbd", *common, *network, *small, pid, "--innodb-lock-wait-timeout=900"])
        client = ["mariadb", "--no-defaults", "-uroot", "-S", str(sock)]
        self._await("mariadbd", "1", [*client, "-N", "-e", "select 1"])
        password = secrets.token_hex(8)
        statements = "create database slurm;" + "".join(
            f"create user 'slurm'@'{host}' identified by '{password}'; grant all on slurm.* to 'slurm'@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        self._call([*client, "-e", statements])
        conf = self.root / "etc" / "slurmdbd.conf"
        conf.touch(0o600)
        lines = f"""
            AuthType=auth/munge
            AuthInfo=cred_expire=5,socket={self.root}/run/munge.sock
            DbdHost={socket.gethostname().partition(".")[0]}
            DbdAddr=127.0.0.1
            DbdPort={port + 1}
            SlurmUser={user}
            PidFile={self.root}/run/slurmdbd.pid
            StorageType=accounting_storage/mysql
            StorageHost=127.0.0.1
            StoragePort={port + 2}
            StorageUser=slurm
            StoragePass={password}
            StorageLoc=slurm
        """
        conf.write_text("\n".join(line.strip() for line in lines.strip().splitlines()) + "\n")
        self._daemon("slurmdbd", ["slurmdbd", "-D"])
        self._await("slurmdbd", "", ["sacctmgr", "-n", "-i", "list", "cluster"])
        for thing in (["cluster", "wmdd"], ["account", "wmdd"], ["user", user, "account=wmdd"]):
            self._call(["sacctmgr", "-i", "add", *thing])

    def _daemon(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon in a session of its own, and write down who it is before anything else happens."""
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._env(), start_new_session=True
            )
        file = self.root / "processes.json"
        known = read_json(file) if file.exists() else {}
        write_json(file, known | {name: [process.pid, _start_time(process.pid)]})

    def _call(self, command: Sequence[str]) -> None:
        done = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=120)  # noqa: S603
        if done.returncode:
            raise WmddError(f"local cluster: {command[0]} failed: {_last_line(done.stderr or done.stdout)}")

    def _await(self, daemon: str, answer: str, command: Sequence[str]) -> None:
        """Ask until the answer comes; say what the daemon's log says when it does not."""

        def answered() -> bool:
            try:
                done = subprocess.run(command, env=self._env(), capture_output=True, text=True, timeout=5)  # noqa: S603
            except subprocess.TimeoutExpired:
                return False
            return done.returncode == 0 and done.stdout.strip() == answer

        log = self.root / "log" / f"{daemon}.out"
        try:
            _wait(answered, 30, "")
        except WmddError:
            raise WmddError(f"local cluster: {daemon} does not answer: {_last_line(log.read_text())}") from None

    def _env(self) -> Mapping[str, str]:
        return os.environ | self.environment | {"PATH": _search_path()}


def stop(root: Path) -> None:
    """End the jobs and daemons of the cluster in a folder, and delete the folder; fine when there is none."""
    file = root / "processes.json"
    known: dict[str, list[int]] = read_json(file) if file.exists() else {}
    if "slurmctld" in known and _alive(*known["slurmctld"]):
        _end_jobs(root)
    # Daemons last started are stopped first: nodes, controller, accounting, its database, munge.
    for name in reversed(known):
        _end(*known[name])
    if known or (root / "etc" / "slurm.conf").exists():
        shutil.rmtree(root, ignore_errors=True)


def _end_jobs(root: Path) -> None:
    """Cancel what is queued, so that no step outlives its node."""
    env = os.environ | {"SLURM_CONF": str(root / "etc" / "slurm.conf")}

    def ask(*command: str) -> str:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20).stdout.strip()  # noqa: S603

    with contextlib.suppress(subprocess.TimeoutExpired, WmddError, OSError):
        ask("scancel", "--quiet", f"--user={getpass.getuser()}")
        _wait(lambda: not ask("squeue", "-h"), 15, "jobs remain")


def _end(pid: int, started: int) -> None:
    """Stop a process if it still is the one that was started, and wait for its end."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 2.0)):
        if not _alive(pid, started):
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(WmddError):
            _wait(lambda: not _alive(pid, started), patience, "")
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _alive(pid: int, started: int) -> bool:
    return started > 0 and _start_time(pid) == started


def _free_ports(count: int) -> int:
    """Return the first of ``count`` consecutive free ports."""
    for _ in range(100):
        first = 20000 + secrets.randbelow(10000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise WmddError(f"local cluster: no {count} consecutive free ports between 20000 and 30000")


def _wait(condition: object, seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise WmddError(message)
        time.sleep(0.05)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it says nothing"


def _search_path() -> str:
    """Return PATH with the folders where Debian puts daemons, which are not on a user's own."""
    return f"{os.environ.get('PATH', '')}:{_SBIN}"

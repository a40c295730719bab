"""A Slurm cluster of one local node, in its own folder, for the duration of a test."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.project_helpers import free_port, until

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
NODE = socket.gethostname().split(".")[0]


def why_no_slurm() -> str | None:
    """Return the reason if no cluster can be started, else None."""
    absent = [program for program in PROGRAMS if _found(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian's slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Start the cluster and yield the environment of sbatch and Slurm's other programs."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name, ExitStack() as daemons:  # short, for its sockets
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        conf = folder / "slurm.conf"
        conf.write_text(_conf(folder))
        daemons.enter_context(_munged(folder / "munge"))
        daemons.enter_context(_daemon("slurmctld", "-D", "-i", "-f", str(conf), log=folder / "slurmctld.out"))
        daemons.enter_context(_daemon("slurmd", "-D", "-f", str(conf), log=folder / "slurmd.out"))
        environment = {"SLURM_CONF": str(conf)}
        try:
            until(lambda: "idle" in ask(environment, "sinfo", "--noheader", "--format=%T", check=False), 90)
        except AssertionError as error:
            logs = [path.read_text()[-2000:] for path in sorted(folder.glob("*.out"))]
            raise RuntimeError("the cluster did not start\n" + "\n".join(logs)) from error
        yield environment
        ask(environment, "scancel", f"--partition={PARTITION}", check=False)


def ask(environment: dict[str, str], *command: str, check: bool = True) -> str:
    """Run one of Slurm's programs."""
    env = os.environ | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, check=check).stdout


PARTITION = "tests"


def _conf(folder: Path) -> str:
    return f"""
ClusterName=tests
SlurmctldHost={NODE}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as its old credentials are valid: two minutes, unless said otherwise.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={NODE} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000
PartitionName={PARTITION} Nodes={NODE} Default=YES State=UP
"""


@contextmanager
def _munged(folder: Path) -> Iterator[None]:
    """Run munged, which authenticates messages of the daemons, as its own user and with a new key."""
    folder.mkdir()
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for path in (folder, key):
        shutil.chown(path, "munge")
    files = {name: f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")}
    options = [*files.values(), f"--socket={folder}/socket"]
    with _daemon("munged", "--foreground", *options, log=folder / "out", user="munge"):
        until((folder / "socket").exists, 10)
        yield


@contextmanager
def _daemon(program: str, *options: str, log: Path, user: str | None = None) -> Iterator[None]:
    with log.open("w") as out:
        found = _found(program)
        assert found is not None
        process = subprocess.Popen([found, *options], stdout=out, stderr=out, user=user)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")

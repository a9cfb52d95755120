"""A Slurm of virtual nodes on loopback: starts by itself and ends exactly what it started.

Needs slurmctld, slurmd, munged and root.  To try things out, until Ctrl-C:

    python tests/slurm/cluster.py
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel")
HOST = socket.gethostname()
ENDED = {
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
}
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CryptoType=crypto/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MinJobAge=86400
KillWait=5
SlurmdTimeout=5
ReturnToService=2
MaxArraySize={max_array_size}
JobCompType=jobcomp/filetxt
JobCompLoc={root}/jobcomp.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs=2 RealMemory=4096 Gres=gpu:{gpus}
PartitionName=all Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=elsewhere Nodes=n5 MaxTime=INFINITE State=UP PriorityTier=1
"""
GPUS = 8  # of a node, as Slurm believes: their devices are empty files
GRES = "NodeName=n[1-5] Name=gpu File={root}/gpu[0-7]\n"


def what_is_missing() -> str:
    """One line that says what a machine lacks to run this. Empty if nothing."""
    if absent := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"{', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "a Slurm of one's own needs root"


class Cluster:
    """Nodes n1 to n4, 2 CPUs and 8 GPUs that are not there each, in the partitions `all` and
    `urgent` (which preempts).

    n5, in `elsewhere`, is down until it is started.
    """

    def __init__(self, root: Path, max_array_size: int = 1001):
        self.root = root
        self.daemons: dict[str, subprocess.Popen] = {}
        for name in ("state", *(f"spool-n{k}" for k in range(1, 6))):
            (root / name).mkdir(parents=True)
        first = free_ports(6)
        self.conf = root / "slurm.conf"
        self.conf.write_text(
            CONF.format(
                host=HOST,
                root=root,
                controller=first + 5,
                nodes=5,
                gpus=GPUS,
                first=first,
                last=first + 4,
                max_array_size=max_array_size,
            )
        )
        for number in range(GPUS):
            (root / f"gpu{number}").touch()
        (root / "gres.conf").write_text(GRES.format(root=root))
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        self._start_munge()
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        for number in range(1, 5):
            self.start_node(f"n{number}")
        self.until(
            lambda: self.node_states() == {f"n{k}": "idle" for k in range(1, 5)}, "four idle nodes"
        )

    def _start_munge(self) -> None:
        """munged wants directories that nobody else may write, and a key of its own."""
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = [f"--{name}-file={self.root}/munged.{name}" for name in ("log", "pid", "seed")]
        options = [f"--key-file={key}", f"--socket={self.root}/munge.socket", *files, "--force"]
        self._start("munged", ["munged", "--foreground", "--num-threads=2", *options])
        self.until((self.root / "munge.socket").exists, "munge's socket")

    def start_node(self, name: str, hidden: Path | None = None) -> None:
        """Start the slurmd of a node.  hidden: a directory that this node sees empty."""
        command = ["slurmd", "-D", "-N", name]
        if hidden is not None:
            script = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", script, str(hidden), *command]
        self._start(name, command)

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.root / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.root,
            )

    def kill_node(self, name: str) -> None:
        """The machine goes silent: its slurmd is killed, what runs on it runs on."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def client(self, *command: str) -> str:
        """The output of squeue, scontrol, scancel, sbatch."""
        ended = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=30
        )
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout

    def node_states(self) -> dict[str, str]:
        """The nodes that answer or did once, and what sinfo calls them. `idle*` does not answer."""
        try:
            output = self.client("sinfo", "-h", "-N", "-p", "all", "-o", "%N %t")
        except AssertionError:  # slurmctld is not up yet
            return {}
        return dict(line.split() for line in output.splitlines())

    def jobs(self) -> dict[str, str]:
        """State of each job, array elements one by one: {"12": "RUNNING", "13_0": "PENDING"}."""
        rows = self.client("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(row.split() for row in rows)

    def fields(self, job: str) -> dict[str, str]:
        """What scontrol says of one job."""
        words = self.client("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, condition, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended; logs in {self.root}"
            assert time.monotonic() < deadline, (
                f"waited {seconds} s in vain for {what}; logs in {self.root}"
            )
            time.sleep(0.1)

    def quiet(self) -> None:
        """Cancel all jobs and put every node back to work."""
        self.client("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        for name in ("n1", "n2", "n3", "n4"):
            if name not in self.daemons:
                self.start_node(name)
        self.until(lambda: set(self.jobs().values()) <= ENDED, "all jobs to end")
        self.until(self._all_idle, "idle nodes")

    def _all_idle(self) -> bool:
        states = self.node_states()
        for name, state in states.items():
            if state == "down":  # it may return by itself meanwhile
                command = ["scontrol", "update", f"nodename={name}", "state=resume"]
                subprocess.run(command, env=self.environment, capture_output=True, timeout=30)
        return set(states.values()) == {"idle"}

    def stop(self) -> None:
        """End the daemons, and whatever jobs left behind.

        Each of these has this SLURM_CONF in its environment.
        """
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()
        for _ in range(3):  # what a dying process has just started
            for pid in self.processes():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def processes(self) -> list[int]:
        mark = f"SLURM_CONF={self.conf}".encode()
        pids = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    pids.append(int(entry.name))
            except OSError:
                continue
        return pids


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on.

    They are above those of jobs (stage.sbatch) and below those that the kernel gives away.
    """
    for first in range(29000 + os.getpid() % 3000, 32700, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for port, each in enumerate(sockets, first):
                each.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


def main() -> None:
    """Run a Slurm until Ctrl-C, and print how to reach it."""
    if missing := what_is_missing():
        sys.exit(missing)
    with tempfile.TemporaryDirectory(prefix="referral-slurm-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)  # munge refuses what others may write
        cluster = Cluster(Path(directory) / "slurm")
        try:
            cluster.start()
            print(f"export SLURM_CONF={cluster.conf}", flush=True)
            ends = {signal.SIGINT, signal.SIGTERM}
            signal.pthread_sigmask(signal.SIG_BLOCK, ends)
            signal.sigwait(ends)
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()

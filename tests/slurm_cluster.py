"""A SLURM cluster of one's own on this machine: two nodes with eight GPUs each, none of it real.

    with SlurmCluster(folder) as cluster:
        job = cluster.run("sbatch", "--parsable", "scripts/speedrun.slurm")

Needs root and Debian's slurmctld, slurmd, slurm-client and munge, which need no configuration and
are not started. Where the kernel allows it the whole cluster lives in a network namespace that
has a loopback device and nothing else, so that no job can reach a network.

The daemons stay children in the foreground: a daemon that detaches itself can not be waited for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare")
SECONDS_TO_START = 60
MAX_SOCKET_PATH = 100  # the kernel takes 107 bytes

# Fake GPUs are files that exist. Nodes are as large as the jobs ask for; nobody measures.
GRES = "NodeName={nodes} Name=gpu Type=a100 File={folder}/gpu[0-7]\n"
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={socket},cred_expire=5
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=1
MailProg={folder}/mail
KillWait=20
MinJobAge=3600
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{node_lines}
PartitionName=gpu-a100 Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=graceful Nodes={nodes} PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=urgent Nodes={nodes} PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=64 RealMemory=1000000 Gres=gpu:a100:8"
)
# What SLURM would have mailed: subject and receiver, one line each.
MAIL = '#!/bin/sh\necho "$@" >>{folder}/mails\n'


def missing_requirement() -> str | None:
    """Why no cluster can be started here; None when one can."""
    if os.getuid() != 0:
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)}" if missing else None


class SlurmCluster:
    """The cluster, from `with` to the end of its block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = ("n1", "n2")
        self.is_isolated = False
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._enter: Sequence[str] = ()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--full", "--user=root", check=False, timeout=10)
                self.until(lambda: not self.run("squeue", "-h", check=False), "jobs end", 30)
        for process in reversed(self._daemons.values()):
            process.terminate()
        for process in reversed(self._daemons.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        timeout: float = 60,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """What a command prints when it runs inside the cluster's network."""
        result = subprocess.run(
            [*self._enter, *map(str, command)],
            env={**self.environment, **(variables or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and result.returncode:
            raise RuntimeError(f"{command} ended with {result.returncode}: {result.stderr}")
        return result.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as JobState or ExitCode."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(w.partition("=")[2] for w in words if w.startswith(f"{name}="))

    def until(self, holds: Callable[[], object], what: str, seconds: float = 120) -> None:
        """Return as soon as `holds`; TimeoutError, naming `what`, when it never does."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds} s for: {what}")
            time.sleep(0.1)

    def kill_node(self, name: str) -> None:
        """End a node as a power cut would: its daemon and everything it had started."""
        daemon = self._daemons.pop(f"slurmd {name}")
        doomed = [daemon.pid]
        # What a node runs has left its daemon and belongs to a shepherd each; it knows its node.
        for pid in _processes_on(name):
            doomed += [_parent(pid), pid]
        for pid in set(doomed) - {0, 1}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        self._spawn(f"slurmd {name}", "slurmd", "-D", "-N", name)

    def _start(self) -> None:
        for name in ("state", "log", "munge", "socket"):
            (self.folder / name).mkdir(parents=True)
        for number in range(8):
            (self.folder / f"gpu{number}").touch()
        # munged refuses a key that others could replace, and a socket that others cannot reach.
        self.folder.chmod(0o711)
        (self.folder / "munge").chmod(0o700)
        (self.folder / "socket").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        mail = self.folder / "mail"
        mail.write_text(MAIL.format(folder=self.folder))
        mail.chmod(0o755)
        self._isolate()
        munge = self._configure()
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}"),
            *(f"--{name}-file={self.folder}/munge/{name}" for name in ("pid", "log", "seed")),
        )
        self.until(munge.exists, "munged to start", SECONDS_TO_START)
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for name in self.nodes:
            self.start_node(name)
        self.until(self._is_idle, "all nodes to be idle", SECONDS_TO_START)

    def _isolate(self) -> None:
        """Make a network namespace with nothing but loopback, if that is allowed."""
        # slurmd resolves its own address only where some address besides 127.0.0.1 exists.
        loopback = "ip link set lo up && ip address add 10.0.0.1/32 dev lo"
        script = f"{loopback} && echo ready && exec sleep infinity"
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._daemons["namespace"] = holder
        assert holder.stdout is not None
        if holder.stdout.readline() == b"ready\n":
            self._enter = ("nsenter", f"--net=/proc/{holder.pid}/ns/net", "--")
            self.is_isolated = True

    def _configure(self) -> Path:
        """Write slurm.conf; returns the path of munged's socket."""
        munge = self.folder / "socket" / "s"
        assert len(str(munge)) <= MAX_SOCKET_PATH, munge
        host = socket.gethostname().partition(".")[0]
        controller_port, *ports = _free_ports(1 + len(self.nodes))
        lines = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        nodes = ",".join(self.nodes)
        text = CONFIGURATION.format(
            host=host,
            controller_port=controller_port,
            socket=munge,
            folder=self.folder,
            node_lines="\n".join(lines),
            nodes=nodes,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(GRES.format(nodes=nodes, folder=self.folder))
        return munge

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.err").open("ab") as errors:
            self._daemons[name] = subprocess.Popen(
                [*self._enter, *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def _is_idle(self) -> bool:
        for name, process in self._daemons.items():
            if process.poll() is not None and name != "namespace":
                log = (self.folder / "log" / f"{name}.err").read_text()
                raise RuntimeError(f"{name} ended: {log[-2000:]}")
        states = self.run("sinfo", "-h", "-N", "-p", "urgent", "-o", "%T", check=False)
        return states.split() == ["idle"] * len(self.nodes)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _processes_on(node: str) -> list[int]:
    """Processes whose environment names the node they run on."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def _parent(pid: int) -> int:
    """The parent of a process; the process itself when it has just ended."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])
    return pid

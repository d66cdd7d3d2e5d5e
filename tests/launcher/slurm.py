"""A real Slurm on namespace hosts: controller and accounting on ctl, a slurmd on each other. Debian's packages."""

import os
import subprocess
from pathlib import Path

from tests.launcher import job
from tests.launcher.hosts import Hosts
from tests.support.patience import until

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "mariadb-install-db")

_SLURM = """
ClusterName=gr
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Requeued jobs wait as long as a credential lives, 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
# Longer than a node of a busy machine takes to answer: one that is late is lost, and its job queued again.
SlurmdTimeout=15
# What a cancelled job has to save and leave.
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=ctl
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
NodeName=DEFAULT CPUs=16 RealMemory=64000 State=UNKNOWN
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=60 State=UP
PartitionName=debug Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent PriorityTier=10
"""
_ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=ctl
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
_DATABASE = """
CREATE DATABASE slurm_acct_db;
CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
CREATE USER slurm@'localhost' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO slurm@'127.0.0.1';
GRANT ALL ON slurm_acct_db.* TO slurm@'localhost';
"""


class Slurm(Hosts):
    """Partitions debug (the default) and urgent, whose jobs preempt those of debug with 120 s of grace."""

    def build(self) -> None:
        super().build()
        self._configure()
        self._start_munge()
        self._start_accounting()
        self._daemon("ctl", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.others():
            self.boot(node)
        expected = {f"{node} idle" for node in self.others()}
        self._await("idle nodes", lambda: set(self.slurm("sinfo", "-hN", "-o", "%N %t").split("\n")) >= expected)

    def __exit__(self, *_: object) -> None:
        pidfile = self.folder / "munged.pid"
        if pidfile.exists():
            os.kill(int(pidfile.read_text()), 15)
        super().__exit__()

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def boot(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def slurm(self, *command: str, **options) -> str:
        """What a command prints on the login node (ctl)."""
        done = self.run("ctl", list(command), env=self.environment, **options)
        return done.stdout.strip()

    def login(self, folder: Path, *command: str) -> subprocess.CompletedProcess:
        """`command` as a user types it on the login node, in `folder`."""
        return self.run(
            "ctl", list(command), cwd=folder, env=job.environment() | {"SLURM_CONF": self.environment["SLURM_CONF"]}
        )

    def state(self, job_id: str) -> str:
        """RUNNING, PENDING, COMPLETED ..., GONE."""
        return self.field(job_id, "JobState")

    def field(self, job_id: str, name: str) -> str:
        """What `scontrol show job` has under that name, GONE where Slurm has forgotten the job."""
        shown = dict(
            word.split("=", 1) for word in self.slurm("scontrol", "-o", "show", "job", job_id).split() if "=" in word
        )
        return shown.get(name, "GONE")

    def _configure(self) -> None:
        nodes = "\n".join(f"NodeName={name} NodeAddr={self.addresses[name]}" for name in self.others())
        (self.folder / "slurm.conf").write_text(_SLURM.format(folder=self.folder, nodes=nodes))
        # Nothing here uses cgroups, and looking for their kind fails inside a namespace.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        dbd = self.folder / "slurmdbd.conf"
        dbd.write_text(_ACCOUNTING.format(folder=self.folder))
        dbd.chmod(0o600)
        for node in self.others():
            (self.folder / "spool" / node).mkdir(parents=True)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{option}={self.folder / name}" for option, name in (files | {"seed-file": "munge.seed"}).items()]
        subprocess.run(["munged", "--force", *options], check=True)

    def _start_accounting(self) -> None:
        """TorchX asks sacct for the state of a job, and sacct asks a database."""
        data = self.folder / "database"
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db"]
        subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
        (self.folder / "database.sql").write_text(_DATABASE)
        where = [
            f"--datadir={data}",
            f"--socket={self.folder}/database.socket",
            f"--pid-file={self.folder}/database.pid",
        ]
        small = [
            "--innodb-buffer-pool-size=32M",
            "--innodb-log-file-size=8M",
            "--skip-log-bin",
            "--bind-address=127.0.0.1",
        ]
        self._daemon(
            "ctl", "mariadbd", "--no-defaults", "--user=root", f"--init-file={self.folder}/database.sql", *where, *small
        )
        self._await("database", (self.folder / "database.socket").exists)
        self._daemon("ctl", "slurmdbd", "-D")
        probe = ["bash", "-c", f"exec 3<>/dev/tcp/{self.addresses['ctl']}/6819"]
        self._await("accounting", lambda: self.run("ctl", probe).returncode == 0)

    def _daemon(self, host: str, *command: str) -> None:
        self.start(host, list(command), self.folder / f"{command[0]}.{host}.console", env=self.environment)

    def _await(self, what: str, there) -> None:
        def alive() -> bool:
            return all(process.poll() is None for host in self.addresses for process in self.running(host))

        until(f"ready: {what}", there, report=self._logs, alive=alive)

    def _logs(self) -> str:
        return "\n".join(f"{log.name}:\n{_tail(log)}" for log in sorted(self.folder.glob("*.log")))


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])

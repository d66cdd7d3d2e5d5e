"""Hosts on one machine: network, UTS, mount and PID namespaces joined by a bridge; killing pid 1 is a power loss."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import pytest

NETWORK = "10.77.0"
# In the new namespaces: name the host, give it its /etc/hosts, and become the command.
_ENTER = 'hostname "$0" && mount --bind "$1/hosts" /etc/hosts && shift && exec "$@"'


def need_root(*programs: str) -> None:
    """Skips the test, with the reason, where hosts cannot be made here."""
    if os.geteuid():
        pytest.skip("needs root: hosts are made of namespaces")
    if missing := [name for name in ("ip", "nsenter", "unshare", *programs) if shutil.which(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}: the Debian packages in tests/launcher/packages.txt")
    network = "ip link add gr0 type veth peer name gr1 && ip link add gr2 type bridge"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-c", network], capture_output=True
    )
    if probe.returncode:
        pytest.skip(f"needs namespaces, which this machine refuses: {probe.stderr.decode().strip()}")


class Hosts:
    """`names` beside a host called ctl. Used with `with`; leaves nothing behind."""

    def __init__(self, names: list[str]) -> None:
        # Not under /tmp of pytest: sockets in it must have short paths, and munge wants safe folders above them.
        self.folder = Path(tempfile.mkdtemp(prefix="gr-hosts-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.addresses = {"ctl": f"{NETWORK}.1"} | {name: f"{NETWORK}.{11 + i}" for i, name in enumerate(names)}
        self._running: dict[str, list[subprocess.Popen]] = {name: [] for name in self.addresses}
        self._prefix = self.folder.name.rpartition("-")[2]  # two clusters may live at once

    def __enter__(self) -> Self:
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def build(self) -> None:
        """Makes the hosts and the network between them."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        ctl = self._space("ctl")
        for name in self.addresses:
            _ip("netns", "add", self._space(name))
            _ip("-n", self._space(name), "link", "set", "lo", "up")
        _ip("-n", ctl, "link", "add", "br0", "type", "bridge")
        _ip("-n", ctl, "addr", "add", f"{self.addresses['ctl']}/24", "dev", "br0")
        _ip("-n", ctl, "link", "set", "br0", "up")
        for name in self.others():
            space, port = self._space(name), f"v{name}"
            _ip("-n", ctl, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("-n", ctl, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.addresses[name]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")

    def __exit__(self, *_: object) -> None:
        for name in self.addresses:
            self.kill(name)
        for name in self.addresses:
            subprocess.run(["ip", "netns", "del", self._space(name)], check=False, capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, host: str, command: list[str], log: Path, **options) -> subprocess.Popen:
        """`command` as pid 1 of `host`; it and all it starts die with `kill`. Appends what it prints to `log`."""
        with log.open("a") as out:
            process = subprocess.Popen(
                self._inside(host, command),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                **options,
            )
        self._running[host].append(process)
        return process

    def run(self, host: str, command: list[str], **options) -> subprocess.CompletedProcess:
        return subprocess.run(self._inside(host, command), capture_output=True, text=True, check=False, **options)

    def running(self, host: str) -> list[subprocess.Popen]:
        """What `start` started on `host` and `kill` has not ended."""
        return self._running[host]

    def kill(self, host: str) -> None:
        """Everything that runs on `host` ends at once. Its network stays, and refuses connections."""
        for process in self._running[host]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self._running[host].clear()

    def link(self, host: str, state: str) -> None:
        """`down`: packets to and from `host` vanish without an answer. `up`: they arrive again."""
        _ip("-n", self._space("ctl"), "link", "set", f"v{host}", state)

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def others(self) -> list[str]:
        """All hosts but ctl."""
        return [name for name in self.addresses if name != "ctl"]

    def _inside(self, host: str, command: list[str]) -> list[str]:
        # nsenter, and not `ip netns exec`, which mounts another /sys in which slurmd finds no cgroups.
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["bash", "-c", _ENTER, host, str(self.folder)]
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", *apart, *enter, *command]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)

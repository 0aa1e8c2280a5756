"""A Debian that really boots: a tree made by mmdebstrap, started by systemd-nspawn, entered by nsenter. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from support.broker import until

SUITES = {
    (3, 11): "bookworm",
    (3, 13): "trixie",
}  # whose Python the packages are built for, by the Python that builds them
PROGRAMS = ("mmdebstrap", "systemd-nspawn", "nsenter", "dpkg-deb")
# systemd-nspawn's own filter of system calls lacks what the workers confine themselves with.
ALLOWED = "landlock_create_ruleset landlock_add_rule landlock_restrict_self"
BOOT_LIMIT_S = 60.0


class MachineMissing(Exception):
    """No such machine can be had here, and why."""


class Machine:
    """A booted Debian with systemd and its own Python; it shares this host's network, so that loopback is one."""

    def __init__(self, tree: Path) -> None:
        """Make and boot it.

        Args:
            tree: where, a path that does not exist yet.

        Raises:
            MachineMissing: not here, and why.
        """
        if os.geteuid() != 0:
            raise MachineMissing("making and booting a Debian tree needs root")
        absent = [name for name in PROGRAMS if shutil.which(name) is None]
        if absent:
            raise MachineMissing(f"not installed: {', '.join(absent)}")
        suite = SUITES.get(sys.version_info[:2])
        if suite is None:
            raise MachineMissing(f"no Debian has Python {sys.version_info[0]}.{sys.version_info[1]}")
        # In memory: dpkg syncs every file, and at the end all of it goes at once.
        tree.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g,mode=755", "tmpfs", str(tree)], check=True)
        include = "systemd,systemd-sysv,dbus,python3,libstdc++6"
        made = subprocess.run(
            ["mmdebstrap", "--variant=minbase", f"--include={include}", suite, str(tree)],
            capture_output=True,
            text=True,
        )
        if made.returncode:
            subprocess.run(["umount", "--lazy", str(tree)], check=True)
            raise MachineMissing(f"mmdebstrap can't make a tree of {suite}: {made.stderr[-400:]}")
        self.tree = tree
        self._log = tree.with_suffix(".log").open("wb")
        self._nspawn = subprocess.Popen(
            ["systemd-nspawn", "-D", str(tree), "--boot", "--register=no", "--keep-unit", "--console=pipe",
             f"--machine=board{os.getpid()}", f"--system-call-filter={ALLOWED}"],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
        )  # fmt: skip
        try:
            until(self._up, "the machine has booted", BOOT_LIMIT_S)
        except AssertionError as exc:
            told = tree.with_suffix(".log").read_text(errors="replace")[-400:]
            self.stop()
            raise MachineMissing(f"a tree does not boot here: {told}") from exc

    def _leader(self) -> str:
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        return children[0] if children else ""

    def _up(self) -> bool:
        if self._nspawn.poll() is not None:
            raise AssertionError("systemd-nspawn ended")
        if not self._leader():
            return False
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def run(
        self, *command: str, check: bool = True, timeout_s: float = 120.0, before: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in there, as root; ``before`` it stands what starts it from out here, strace perhaps."""
        done = subprocess.run(
            [*before, "nsenter", "-t", self._leader(), "-m", "-u", "-i", "-p", "--wd=/", *command],
            capture_output=True, text=True, timeout=timeout_s,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"},
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done

    def active(self, unit: str) -> bool:
        return self.run("systemctl", "is-active", unit, check=False).stdout.strip() == "active"

    def main_pid(self, unit: str) -> int:
        return int(self.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout)

    def stop(self) -> None:
        """Pull the plug."""
        if self._nspawn.poll() is None:
            leader = self._leader()
            os.kill(int(leader) if leader else self._nspawn.pid, signal.SIGKILL)
            self._nspawn.wait(30)
        self._log.close()
        subprocess.run(["umount", "--lazy", str(self.tree)], check=True)

"""The board's Debian packages, in a Debian that boots: install, enrol, serve, survive kills and an upgrade under load, leave."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from edgefleet_shared.assignment import AGENT
from support import agents
from support.broker import free_port, until
from support.fleet import Fleet, manifests, write
from support.machine import Machine, MachineMissing
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("fleet-agent.service", "fleet-runtime.service")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    try:
        made = Machine(tmp_path_factory.mktemp("machine") / "tree")
    except MachineMissing as exc:
        pytest.skip(str(exc))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def packages(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """edgefleet-agent, edgefleet-engine-onnxruntime and edgefleet-runtime-grpc, as they are released."""
    out = tmp_path_factory.mktemp("packages")
    done = subprocess.run(
        [sys.executable, str(ROOT / "agent/debian/build.py"), "--out", str(out), "--engine", "onnxruntime", "--compression", "none"],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        folder = manifests(made.folder / "manifests")
        made.start()
        made.json("apply", "-f", str(folder / "class.yaml"))
        made.json("model", "add", "-f", str(folder / "model-1.yaml"))
        made.json("model", "compile", "toy", "1", "--class", "pc")
        yield made
    finally:
        made.close()


def install(machine: Machine, *packages: Path) -> str:
    """dpkg in there; the packages are put beside the root user's files."""
    names = []
    for package in packages:
        (machine.tree / "root" / package.name).write_bytes(package.read_bytes())
        names.append(f"/root/{package.name}")
    return machine.run("dpkg", "--install", *names).stdout


@pytest.fixture(scope="module")
def grpc_port(machine: Machine) -> int:
    """Where its gRPC face will be, moved in the same way as the runtime's."""
    chosen = free_port()
    folder = machine.tree / "etc/systemd/system/fleet-runtime-grpc.socket.d"
    folder.mkdir(parents=True)
    (folder / "port.conf").write_text(f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{chosen}\n")
    return chosen


@pytest.fixture(scope="module")
def port(machine: Machine, packages: list[Path], grpc_port: int) -> int:
    """Installed; the runtime's port is moved as an operator moves it, since this machine shares the host's loopback."""
    chosen = free_port()
    folder = machine.tree / "etc/systemd/system/fleet-runtime.socket.d"
    folder.mkdir(parents=True)
    lines = ("[Socket]", "ListenStream=", f"ListenStream=127.0.0.1:{chosen}", "ListenStream=%t/edgefleet/runtime.sock")
    (folder / "port.conf").write_text("\n".join(lines) + "\n")
    install(machine, *packages)
    return chosen


def ask(port: int, path: str) -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_fresh_board_serves_at_once_and_its_agent_waits_to_be_enrolled(machine, port):
    until(lambda: machine.active("fleet-runtime.service"), "the runtime is up")
    assert ask(port, "/v2/health/live")[0] == 200
    assert not machine.active("fleet-agent.service")
    shown = machine.run("systemctl", "show", "--property=ConditionResult,UnitFileState", "fleet-agent").stdout
    assert "ConditionResult=no" in shown
    assert "UnitFileState=enabled" in shown
    owner = machine.run("stat", "--format=%U %G %a", "/var/lib/edgefleet").stdout.strip()
    assert owner == "edgefleet edgefleet 750"


def test_root_enrols_it_and_a_rollout_reaches_it(machine, port, fleet):
    token = fleet.client().token("pc", site="lab", device="packaged")
    machine.run("fleet-agent", "enroll", "--url", f"https://127.0.0.1:{fleet.api_port}", "--token", token)
    strangers = machine.run("find", "/var/lib/edgefleet", "-not", "-user", "edgefleet").stdout
    assert strangers == ""
    machine.run("systemctl", "start", "fleet-agent")
    until(lambda: any(d["online"] and d["state"] for d in fleet.client().devices()), "it has reported", 60)
    spec = {
        "model": "toy", "version": "1", "soak_s": 1.0, "timeout_s": 120.0, "reach_window_s": 60.0,
        "selector": {"devices": ["packaged"]}, "waves": [{"name": "all", "percent": 100}],
    }  # fmt: skip
    fleet.json("rollout", "create", "-f", str(write(fleet.folder / "deb.yaml", "Rollout", "to-packaged", spec)))
    done = fleet.run("rollout", "watch", "to-packaged", "--timeout", "120", "--json")
    assert done.returncode == 0, done.stdout
    assert ask(port, "/v2/models/toy/ready")[0] == 200
    told = machine.run("journalctl", "--unit=fleet-runtime", "--output=cat", "--no-pager").stdout
    assert "worker_not_confined" not in told


GATEWAY = "fleet-runtime-grpc.service"


def test_the_grpc_gateway_starts_with_its_first_client_and_comes_back_after_a_kill(machine, port, grpc_port):
    assert machine.active("fleet-runtime-grpc.socket")
    assert not machine.active(GATEWAY), "nobody has asked yet"

    def ready() -> bool:
        client = InferenceServerClient(f"127.0.0.1:{grpc_port}")
        try:
            return bool(client.is_model_ready("toy"))
        except InferenceServerException:
            return False
        finally:
            client.close()

    until(ready, "the first client is answered", 60)
    before = machine.main_pid(GATEWAY)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", GATEWAY)
    until(lambda: machine.active(GATEWAY) and machine.main_pid(GATEWAY) not in (0, before), "it is back", 40)
    until(ready, "and answers", 60)


def test_a_restart_of_the_grpc_gateway_fails_no_call(machine, port, grpc_port):
    ended, answered = threading.Event(), list[bool]()

    def ask_on() -> None:
        client = InferenceServerClient(f"127.0.0.1:{grpc_port}")
        while not ended.is_set():
            try:
                answered.append(bool(client.is_model_ready("toy")))
            except InferenceServerException as exc:
                answered.append(False)
                print(exc)
        client.close()

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            count = len(answered)
            until(lambda count=count: len(answered) > count + 100, "calls are answered", 60)
            machine.run("systemctl", "restart", GATEWAY)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    assert answered.count(False) == 0, f"of {len(answered)}"


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_comes_back(machine, port, service):
    before = machine.main_pid(service)
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", service)
    until(lambda: machine.active(service) and machine.main_pid(service) not in (0, before), f"{service} is back", 40)
    until(lambda: ask(port, "/v2/models/toy/ready")[0] == 200, "the model is served", 40)


def test_an_upgrade_that_comes_to_nothing_leaves_the_board_within_reach(machine, port, packages, tmp_path):
    broken = repacked(packages[0], tmp_path, preinst="#!/bin/sh\nexit 1\n")
    (machine.tree / "root" / broken.name).write_bytes(broken.read_bytes())
    runtime = machine.main_pid("fleet-runtime.service")
    assert machine.run("dpkg", "--install", f"/root/{broken.name}", check=False).returncode != 0
    until(lambda: machine.active("fleet-agent.service"), "the agent runs", 60)
    assert machine.main_pid("fleet-runtime.service") == runtime


def test_the_package_is_put_in_again_where_etc_is_read_only(machine, port, packages):
    machine.run("mount", "--bind", "/etc", "/etc")
    try:
        machine.run("mount", "-o", "remount,ro,bind", "/etc")
        install(machine, packages[0])
    finally:
        machine.run("umount", "/etc")
    assert machine.active("fleet-agent.service")


POLICY = "/sys/devices/system/cpu/cpufreq/policy0"


@pytest.fixture
def scaling(machine) -> Iterator[Callable[[str], str]]:
    """A processor whose clock can be set, in the place of this host's, which the machine may not touch; reads one of its files."""
    files = {
        "scaling_governor": "performance", "scaling_max_freq": "2000000", "cpuinfo_min_freq": "600000", "cpuinfo_max_freq": "2000000",
        "scaling_available_governors": "performance powersave",
    }  # fmt: skip
    machine.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/sys/devices/system/cpu")
    try:
        lines = "; ".join(f"echo {content} > {POLICY}/{name}" for name, content in files.items())
        machine.run("sh", "-ec", f"mkdir -p {POLICY}; {lines}")
        machine.run("systemctl", "start", "fleet-power")
        yield lambda name: machine.run("cat", f"{POLICY}/{name}").stdout.strip()
    finally:
        machine.run("umount", "/sys/devices/system/cpu")


def test_slots_that_change_often_do_not_end_the_watch_for_the_next_power_profile(machine, port, scaling):
    slots = "/var/lib/edgefleet/slots.json"
    for _ in range(12):
        # What a profile of before would have left; nothing serves here that asks for one.
        machine.run(
            "sh",
            "-ec",
            f"echo powersave > {POLICY}/scaling_governor; cp -p {slots} {slots}.new; mv {slots}.new {slots}",
        )
        until(lambda: scaling("scaling_governor") == "performance", "the change was looked at", 60)
        until(lambda: not busy(machine, "fleet-power.service"), "and the next one is watched for", 60)
    assert machine.active("fleet-power.path")


def busy(machine: Machine, unit: str) -> bool:
    return machine.run("systemctl", "is-active", unit, check=False).stdout.strip() in ("activating", "deactivating")


def test_a_change_that_the_watch_missed_is_looked_at_all_the_same(machine, port, scaling):
    folder = machine.tree / "etc/systemd/system/fleet-power.timer.d"
    folder.mkdir()
    (folder / "soon.conf").write_text("[Timer]\nOnUnitInactiveSec=\nOnUnitInactiveSec=1s\nAccuracySec=1ms\n")
    machine.run("systemctl", "stop", "fleet-power.path")
    machine.run("systemctl", "daemon-reload")
    try:
        machine.run("sh", "-ec", f"echo powersave > {POLICY}/scaling_governor")
        until(lambda: scaling("scaling_governor") == "performance", "it was looked at again", 60)
    finally:
        (folder / "soon.conf").unlink()
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "start", "fleet-power.path")


@contextmanager
def under_load(port: int) -> Iterator[list[int]]:
    """Requests without a pause; their statuses, or the negative number of the error that came instead."""
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            try:
                statuses.append(ask(port, "/v2/models/toy")[0])
            except OSError as exc:
                statuses.append(-(exc.errno or 1))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until(lambda: len(statuses) > 10, "requests are under way")
        yield statuses
        enough = len(statuses) + 50
        until(lambda: len(statuses) >= enough, "requests after it")
    finally:
        stop.set()
        thread.join()


def roll_out_agent(fleet: Fleet, name: str, wheels: list[Path], timeout_s: float = 240.0) -> dict:
    """Add a version of the agent, roll it out, and wait for the end."""
    version = fleet.json("agent", "add", *map(str, wheels))["version"]
    spec = {
        "model": AGENT, "version": version, "soak_s": 0.0, "timeout_s": timeout_s, "reach_window_s": 60.0,
        "selector": {"devices": ["packaged"]}, "waves": [{"name": "all", "percent": 100}],
    }  # fmt: skip
    fleet.json("rollout", "create", "-f", str(write(fleet.folder / f"{name}.yaml", "Rollout", name, spec)))
    fleet.run("rollout", "watch", name, "--timeout", "280", "--json", timeout_s=300)
    return fleet.client().rollout(name)


def test_the_agent_updates_itself_under_load_and_fails_no_request(machine, port, fleet, tmp_path):
    wheels = agents.changed(agents.wheels(tmp_path), tmp_path / "v", "0.2.0")
    runtime = machine.main_pid("fleet-runtime.service")
    with under_load(port) as statuses:
        done = roll_out_agent(fleet, "agent-0.2.0", wheels)
    assert done["phase"] == "succeeded", machine.run(
        "journalctl", "--unit=fleet-agent", "--no-pager", "-n", "60"
    ).stdout
    assert set(statuses) == {200}
    assert machine.main_pid("fleet-runtime.service") == runtime
    assert fleet.client().device("packaged")["report"]["agent_version"] == "0.2.0"


def test_an_agent_that_hangs_is_ended_and_the_one_before_runs_again_under_load(machine, port, fleet, tmp_path):
    anchor = "        agent.run()\n"
    planted = "        import time\n        time.sleep(3600)\n"
    wheels = agents.changed(agents.wheels(tmp_path), tmp_path / "v", "0.3.0", "edgefleet_agent/app.py", anchor, planted)
    with under_load(port) as statuses:
        done = roll_out_agent(fleet, "agent-0.3.0", wheels, timeout_s=150.0)  # three alarms of a quarter of it each
        (board,) = done["boards"]
        assert board["outcome"] == "failed_rolled_back", board
    assert "started 3 times" in board["reason"]
    assert set(statuses) == {200}
    assert fleet.client().device("packaged")["report"]["agent_version"] == "0.2.0"


def test_an_upgrade_under_load_fails_no_request_and_keeps_the_board_what_it_was(machine, port, packages, tmp_path):
    newer = [repacked(package, tmp_path) for package in packages]
    before = {service: machine.main_pid(service) for service in SERVICES}
    with under_load(port) as statuses:
        install(machine, *newer)
        until(lambda: all(machine.active(s) and machine.main_pid(s) != before[s] for s in SERVICES), "both are new", 60)
    assert set(statuses) == {200}
    shown = machine.run("dpkg-query", "--show", "--showformat=${Version} ${db:Status-Status}", "edgefleet-agent").stdout
    assert shown.endswith("+next installed")
    assert "toy 1 (good)" in machine.run("fleet-agent", "status").stdout


def repacked(
    package: Path, folder: Path, preinst: str = "", change: Callable[[Path], None] = lambda tree: None
) -> Path:
    """The same package as a later version, with a script of that text, and changed."""
    tree = folder / package.stem
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(tree)], check=True)
    change(tree)
    control = tree / "DEBIAN/control"
    text = re.sub(r"^(Version: .*)$", r"\1+next", control.read_text(), flags=re.M)
    control.write_text(re.sub(r"(edgefleet-agent \(= [^)]*)\)", r"\1+next)", text))
    if preinst:
        (tree / "DEBIAN/preinst").write_text(preinst)
        (tree / "DEBIAN/preinst").chmod(0o755)
    made = folder / package.name
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(made)], check=True, stdout=-3)
    return made


def of_another_generation(tree: Path) -> None:
    """Modules that can't be used together with those of before, nor those of before with them."""
    changed = 0
    for module in tree.rglob("edgefleet_*/**/*.py"):
        text = module.read_text()
        module.write_text(text.replace("EdgefleetError", "EdgefleetFault"))
        changed += "EdgefleetError" in text
    assert changed > 30


CUTS = (0.1, 0.4, 0.7, 0.95)  # of our own modules that have got their names


@pytest.mark.parametrize("share", CUTS)
def test_an_upgrade_that_is_cut_off_leaves_agent_and_runtime_that_start(machine, port, packages, tmp_path, share):
    newer = repacked(packages[0], tmp_path, change=of_another_generation)
    (machine.tree / "root" / newer.name).write_bytes(newer.read_bytes())
    files = subprocess.run(["dpkg-deb", "--contents", str(newer)], capture_output=True, text=True, check=True).stdout
    regular = [line for line in files.splitlines() if line.startswith("-")]
    own = [number for number, line in enumerate(regular) if "/edgefleet_" in line and line.endswith(".py")]
    number = own[int(share * len(own))]
    killed = machine.run(
        "dpkg", "--install", f"/root/{newer.name}", check=False,
        before=("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=rename", "-e", f"inject=rename:signal=KILL:when={number}"),
    )  # fmt: skip
    assert killed.returncode != 0
    assert (
        "half-installed"
        in machine.run("dpkg-query", "--show", "--showformat=${db:Status-Status}", "edgefleet-agent").stdout
    )
    before = {service: machine.main_pid(service) for service in SERVICES}
    machine.run("systemctl", "stop", *SERVICES)  # the power goes with dpkg, and comes back
    machine.run("systemctl", "start", *SERVICES)
    until(lambda: all(machine.active(s) and machine.main_pid(s) != before[s] for s in SERVICES), "both run", 60)
    until(lambda: ask(port, "/v2/models/toy/ready")[0] == 200, "the model is served", 40)
    assert "toy 1 (good)" in machine.run("fleet-agent", "status").stdout


def test_what_was_cut_off_is_installed_once_more(machine, port, packages, tmp_path):
    install(
        machine,
        *(
            repacked(package, tmp_path, change=of_another_generation if package == packages[0] else lambda tree: None)
            for package in packages
        ),
    )
    until(lambda: all(machine.active(s) for s in SERVICES), "both run", 60)
    until(lambda: ask(port, "/v2/models/toy/ready")[0] == 200, "the model is served", 40)


def test_the_version_before_is_installed_over_a_later_one(machine, port, fleet, packages):
    before = {service: machine.main_pid(service) for service in SERVICES}
    with under_load(port) as statuses:
        install(machine, *packages)
        until(lambda: all(machine.active(s) and machine.main_pid(s) != before[s] for s in SERVICES), "both are new", 60)
    assert set(statuses) == {200}
    shown = machine.run("dpkg-query", "--show", "--showformat=${Version} ${db:Status-Status}", "edgefleet-agent").stdout
    assert shown.endswith(" installed")
    assert "+next" not in shown
    assert "toy 1 (good)" in machine.run("fleet-agent", "status").stdout
    assert (
        machine.run("find", "/usr/lib/edgefleet/in-use", "-maxdepth", "1", "-name", "agent.*").stdout.count("\n") == 1
    )
    until(lambda: fleet.client().device("packaged")["online"], "and it is within reach", 60)


def test_an_engine_that_is_removed_is_reported_no_longer_while_the_runtime_serves_on(machine, port, fleet):
    runtime = machine.main_pid("fleet-runtime.service")
    machine.run("dpkg", "--remove", "edgefleet-engine-onnxruntime")
    until(lambda: fleet.client().device("packaged")["report"]["fingerprint"]["engines"] == {}, "it is told", 60)
    assert machine.main_pid("fleet-runtime.service") == runtime
    assert ask(port, "/v2/models/toy/ready")[0] == 200
    left = machine.run("find", "/usr/lib/edgefleet", "-path", "*onnxruntime*", "-not", "-path", "*/agent*").stdout
    assert left == ""
    assert machine.run("find", "/usr/lib/edgefleet/grpc/", "-name", "*.pyc").stdout != "", "what others need stays"


def test_removed_it_is_silent_and_purged_it_leaves_nothing_but_its_user(machine, port):
    machine.run("dpkg", "--remove", "edgefleet-engine-onnxruntime", "edgefleet-runtime-grpc", "edgefleet-agent")
    assert not any(
        machine.active(unit) for unit in (*SERVICES, GATEWAY, "fleet-runtime.socket", "fleet-runtime-grpc.socket")
    )
    assert machine.run("test", "-f", "/var/lib/edgefleet/agent.json", check=False).returncode == 0
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/v2/health/live")
    machine.run("dpkg", "--purge", "edgefleet-agent", "edgefleet-engine-onnxruntime", "edgefleet-runtime-grpc")
    gone = (
        "/var/lib/edgefleet",
        "/usr/lib/edgefleet",
        "/run/edgefleet",
        "/usr/bin/fleet-agent",
        "/usr/bin/fleet-runtime",
    )
    assert [path for path in gone if machine.run("test", "-e", path, check=False).returncode == 0] == []
    assert machine.run("systemctl", "list-unit-files", "fleet-*", "--no-legend", check=False).stdout.strip() == ""
    assert machine.run("id", "edgefleet").returncode == 0


@pytest.fixture
def installed_again(machine: Machine, packages: list[Path]) -> None:
    install(machine, packages[0])


def test_a_state_folder_that_is_a_disk_of_its_own_is_purged_and_left_empty(machine, installed_again):
    state = "/var/lib/edgefleet"
    machine.run("mount", "-t", "tmpfs", "tmpfs", state)
    try:
        machine.run("sh", "-ec", f"mkdir {state}/identity; touch {state}/identity/agent.key")
        machine.run("dpkg", "--purge", "edgefleet-agent")
        assert machine.run("find", state, "-mindepth", "1").stdout == ""
    finally:
        machine.run("umount", state)


def test_what_is_mounted_below_the_state_folder_is_not_purged_with_it(machine, installed_again):
    stick = "/var/lib/edgefleet/stick"
    machine.run("sh", "-ec", f"mkdir {stick}; mount -t tmpfs tmpfs {stick}; echo bundle > {stick}/bundle.tar")
    try:
        machine.run("dpkg", "--purge", "edgefleet-agent")
        assert machine.run("find", "/var/lib/edgefleet", "!", "-type", "d").stdout.split() == [f"{stick}/bundle.tar"]
    finally:
        machine.run("umount", stick)
        machine.run("rmdir", stick, "/var/lib/edgefleet")


def test_removed_it_gives_the_processor_back_what_a_power_profile_took(machine, installed_again, scaling):
    machine.run("sh", "-ec", "echo {} > /var/lib/edgefleet/slots.json; systemctl start fleet-power")
    machine.run("sh", "-ec", f"echo powersave > {POLICY}/scaling_governor; echo 600000 > {POLICY}/scaling_max_freq")
    machine.run("dpkg", "--remove", "edgefleet-agent")
    assert (scaling("scaling_governor"), scaling("scaling_max_freq")) == ("performance", "2000000")

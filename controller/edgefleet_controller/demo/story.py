"""``fleet demo``: receives an empty folder, hands on the whole story and its report.

Everything is done by the operator's own programs and the HTTP API, on real processes: nothing here reaches into the controller. Every
figure of the report is measured in this run.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from edgefleet_shared.errors import EdgefleetError, EnvironmentProblem
from rich.console import Group
from rich.live import Live
from rich.table import Table

from edgefleet_controller import photos
from edgefleet_controller.adding import add_model, compile_and_sign
from edgefleet_controller.applying import apply_manifests
from edgefleet_controller.cli.output import console, grid
from edgefleet_controller.cli.rollout import render
from edgefleet_controller.client import FleetClient
from edgefleet_controller.demo.boards import Board, program
from edgefleet_controller.demo.traffic import Application, Truths
from edgefleet_controller.demo.versions import MODEL, Versions, live_photos, read_manifests
from edgefleet_controller.settings import default_cache
from edgefleet_controller.transport.broker import install_mosquitto

SITE = "demo"
PER_CLASS = 2
POLL_S = 0.4
START_TIMEOUT_S = 60.0
ROLLOUT_TIMEOUT_S = 240.0
COUNTS = {"calibration": 48, "calibration-2": 48, "holdout": 96, "golden": 32, "live": 12}
SHORT_COUNTS = {"calibration": 24, "calibration-2": 24, "holdout": 48, "golden": 16, "live": 6}
SHORT_CLASSES = ("x86-onnxruntime", "x86-litert")
SOAK_S, SHORT_SOAK_S = 4.0, 2.0
BROKEN = frozenset({"3", "4"})


def run(folder: Path, report: Path | None, *, short: bool) -> int:
    """Play the demo.

    Args:
        folder: its working folder; what an earlier run left there is removed.
        report: where the figures go as JSON.

    Returns:
        0 when everything came out as told, 1 when not.

    Raises:
        EdgefleetError: it could not be played.
    """
    install_mosquitto()
    folder = folder.resolve()
    if folder.exists():
        if any(folder.iterdir()) and not (folder / ".edgefleet-demo").exists():
            raise EnvironmentProblem(f"{folder} is not empty and no demo made it", hint="choose another --folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / ".edgefleet-demo").touch()
    story = Story(folder, short=short)
    try:
        figures, surprises = story.play()
    finally:
        story.close()
    if report is not None:
        report.write_text(json.dumps(figures, indent=2) + "\n")
        console.print(f"\nreport: {report}")
    for surprise in surprises:
        console.print(f"[red]not as expected:[/] {surprise}", highlight=False)
    return 1 if surprises else 0


class Story:
    """The demo's state: one controller, its boards and their applications."""

    def __init__(self, folder: Path, *, short: bool) -> None:
        self._folder, self._home = folder, folder / "fleet"
        self._pictures = folder / "photos"  # where manifests/demo looks for them
        self._began = time.monotonic()
        self._counts = SHORT_COUNTS if short else COUNTS
        self._soak_s = SHORT_SOAK_S if short else SOAK_S
        classes, self._model, self._rollout = read_manifests(Path("manifests/demo"))
        self._served = [
            c["metadata"]["name"] for c in classes
            if c["spec"]["arch"] == "x86_64" and (not short or c["metadata"]["name"] in SHORT_CLASSES)
        ]  # fmt: skip
        self._classes = [c["metadata"]["name"] for c in classes if not short or c["metadata"]["name"] in self._served]
        self._manifests = classes
        self._controller: subprocess.Popen[bytes] | None = None
        self._client: FleetClient | None = None
        self.boards: dict[str, Board] = {}
        self.applications: dict[str, Application] = {}
        self._rollouts: list[dict[str, Any]] = []
        self._surprises: list[str] = []

    @property
    def client(self) -> FleetClient:
        assert self._client is not None
        return self._client

    def play(self) -> tuple[dict[str, Any], list[str]]:
        """The whole story; its figures and what did not come out as told."""
        self._say("photos and network, from packages")
        kept, remarks = photos.gather(default_cache(), self._counts, self._note)
        shutil.copytree(kept, self._pictures)
        for remark in remarks:
            self._note(remark)
        self._start_controller()
        versions = Versions(self._model, self._pictures, self._folder / "manifests", self._counts)
        self._say("compile, check on the engine itself, sign: version 1 for every class")
        self._compile("1", versions.first(), self._classes)
        self._say("version 2, another calibration: a different build")
        self._compile("2", versions.second(), self._classes)
        self._say("version 3, calibrated on tensors that were normalised twice")
        self._compile("3", versions.third(self.client), self._served, broken=True)
        self._say("version 4, a debugging histogram of 1.2 GB left in the graph")
        self._compile("4", versions.fourth(self.client), self._served, broken=True)

        self._say(f"{PER_CLASS * len(self._served)} boards enrol")
        self._start_boards()
        self._roll_out("1", "succeeded", meanwhile=self._start_traffic)
        away = f"{_short_name(self._served[0])}-{PER_CLASS}"
        self._say(f"{away} loses its line: it is offline while version 2 rolls out, its model serves on")
        self.boards[away].cut_off()
        self._until(lambda: not self._device(away)["online"], f"{away} is seen to be offline")
        self._roll_out("2", "succeeded", meanwhile=lambda state: self._come_back(state, away))
        self._roll_out("3", "rolled_back")
        self._roll_out("4", "rolled_back")
        return self._figures()

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _start_controller(self) -> None:
        self._say("the controller: HTTPS API, its own mosquitto under mutual TLS, SQLite, a local blob store")
        api, broker = _free_port(), _free_port()
        self._fleet("init", "--listen", f"127.0.0.1:{api}", "--broker-port", str(broker))
        with (self._folder / "controller.log").open("ab") as log:
            self._controller = subprocess.Popen(
                [program("fleet"), "serve", "--home", str(self._home)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._client = FleetClient(self._home)

        def answers() -> bool:
            assert self._controller is not None
            if self._controller.poll() is not None:
                raise EnvironmentProblem(f"the controller ended, see {self._folder}/controller.log")
            with contextlib.suppress(EdgefleetError):
                return bool(self.client.status()["broker_connected"])
            return False

        self._until(answers, "the controller answers")
        chosen = [c for c in self._manifests if c["metadata"]["name"] in self._classes]
        path = self._folder / "classes.yaml"
        path.write_text(yaml.safe_dump_all(chosen, sort_keys=False))
        apply_manifests(self._home, path, None)

    def _compile(self, version: str, manifest: Path, classes: list[str], *, broken: bool = False) -> None:
        add_model(self._home, manifest, "", lambda *_: None)
        if broken:
            self._refused(version, classes)
        shown = compile_and_sign(
            self._home, MODEL, version, tuple(classes), despite_quality=broken,
            keys=self._home / "keys" / "offline", show=lambda *_: None,
        )  # fmt: skip
        for artifact in shown["artifacts"]:
            quality, timings = artifact["quality"], artifact["timings"]
            agreement = "unmeasured" if quality["agreement"] is None else f"{quality['agreement']:.3f}"
            speed = "unmeasured here" if timings["p50_ms"] is None else f"{timings['p50_ms']:.1f} ms (float {timings['float_p50_ms']:.1f})"  # fmt: skip
            forced = f"  forced past: {'; '.join(quality['misses'])}" if quality["misses"] else ""
            self._note(
                f"{artifact['class']:18} {quality['float_bytes']:>9} -> {quality['compiled_bytes']:>8} bytes  "
                f"agreement {agreement}  p50 {speed}{forced}"
            )

    def _refused(self, version: str, classes: list[str]) -> None:
        """Without the flag the controller's own check refuses it; shown on one class."""
        try:
            compile_and_sign(
                self._home, MODEL, version, (classes[0],), despite_quality=False, keys=None, show=lambda *_: None
            )
        except EdgefleetError as exc:
            self._note(f"refused by the controller: {exc.message}")
            return
        self._surprises.append(f"version {version} passed the controller's quality check")

    def _start_boards(self) -> None:
        for device_class in self._served:
            for number in range(1, PER_CLASS + 1):
                name = f"{_short_name(device_class)}-{number}"
                board = Board(name, device_class, self._folder / "boards" / name)
                board.folder.parent.mkdir(exist_ok=True)
                board.enroll(self.client.url, self.client.token(device_class, site=SITE, device=name))
                board.launch()
                self.boards[name] = board
        for board in self.boards.values():
            board.wait_until_listening()
        self._until(lambda: all(d["online"] and d["state"] for d in self.client.devices()), "every board has reported")

    def _start_traffic(self, state: dict[str, Any]) -> None:
        """Each board's application starts with the first version that it serves."""
        if not self.applications:
            self._truths, self._photos = Truths(), live_photos(self._pictures / "live", self._model)
        for name, board in self.boards.items():
            if name not in self.applications and self._device(name)["version"] and self._device(name)["outcome"]:
                app = Application(
                    name, board.device_class, board.infer_socket, MODEL, self._photos, self._truths, BROKEN
                )
                self.applications[name] = app
                app.start()

    def _come_back(self, state: dict[str, Any], away: str) -> None:
        if state["phase"] == "catching_up" and not self._device(away)["online"]:
            self._note(f"version 2 passed everywhere else; {away} gets its line back")
            self.boards[away].start_agent()
            self._until(lambda: self._device(away)["online"], f"{away} is online again")

    def _roll_out(
        self, version: str, expected: str, meanwhile: Callable[[dict[str, Any]], None] = lambda s: None
    ) -> None:
        name = f"{MODEL}-{version}"
        self._say(f"roll out version {version}: canary per class, half, all")
        manifest = json.loads(json.dumps(self._rollout))
        manifest["metadata"]["name"] = name
        manifest["spec"] |= {
            "version": version, "soak_s": self._soak_s, "selector": {"sites": [SITE], "classes": self._served},
        }  # fmt: skip
        state = self.client.create_rollout(manifest)
        end = time.monotonic() + ROLLOUT_TIMEOUT_S
        with self._shown() as show:
            while not state["ended"]:
                if time.monotonic() > end:
                    raise EnvironmentProblem(f"rollout {name} did not end in {ROLLOUT_TIMEOUT_S:.0f} s: it is {state['phase']}")  # fmt: skip
                show(Group(render(state), self._traffic_table()))
                meanwhile(state)
                for device in self.client.devices():
                    if device["outcome"] == "succeeded" and device["name"] in self.applications:
                        self.applications[device["name"]].committed(int(device["version"]))
                time.sleep(POLL_S)
                state = self.client.rollout(name)
            meanwhile(state)
            show(Group(render(state), self._traffic_table()))
        self._rollouts.append(state)
        if state["phase"] != expected:
            self._surprises.append(
                f"rollout of version {version} ended {state['phase']}, not {expected}: {state['reason']}"
            )

    # -- telling -------------------------------------------------------------------------------------------------------

    def _figures(self) -> tuple[dict[str, Any], list[str]]:
        self._say("summary")
        for app in self.applications.values():
            app.stop()
        (two,) = self.client.models(MODEL, "2")
        figures = {
            "classes": [_class_figures(a) for a in two["artifacts"]],
            "rollouts": [_rollout_figures(state) for state in self._rollouts],
            "boards": [self._board_figures(name) for name in self.boards],
            "controller_sent_bytes": self.client.status()["sent_bytes"],
            "seconds": round(time.monotonic() - self._began, 1),
        }
        for board in figures["boards"]:
            for key, wanted in (("failed", 0), ("wrong_version", 0), ("final_version", "2")):
                if board[key] != wanted:
                    self._surprises.append(f"{board['name']}: {key} is {board[key]!r}, not {wanted!r}")
            if not board["requests"]:
                self._surprises.append(f"{board['name']}: no request was sent")
        for rollout in figures["rollouts"][2:]:
            if rollout["boards_touched"] != len(self._served):
                self._surprises.append(f"version {rollout['version']} touched {rollout['boards_touched']} boards, not one per class")  # fmt: skip
        self._summary(figures)
        return figures, self._surprises

    def _board_figures(self, name: str) -> dict[str, Any]:
        tally = self.applications[name].tally if name in self.applications else None
        if tally is not None and tally.first_failure:
            self._note(f"{name}: first failure: {tally.first_failure}")
        return {
            "name": name,
            "class": self.boards[name].device_class,
            "requests": tally.requests if tally else 0,
            "failed": tally.failed if tally else 0,
            "wrong_version": tally.wrong_version if tally else 0,
            "longest_gap_ms": round(tally.longest_gap_ms, 1) if tally else None,
            "final_version": tally.last_version if tally else "",
            "answers_by_version": dict(tally.by_version) if tally else {},
        }

    def _summary(self, figures: dict[str, Any]) -> None:
        for key, columns in (
            ("classes", ("name", "engine", "arch", "float_bytes", "compiled_bytes", "agreement", "p50_ms", "p95_ms", "float_p50_ms")),
            ("rollouts", ("version", "outcome", "boards_selected", "boards_touched", "boards_rolled_back")),
            ("boards", ("name", "class", "requests", "failed", "wrong_version", "longest_gap_ms", "final_version")),
        ):  # fmt: skip
            rows = [[f"{row[c]:.4g}" if isinstance(row[c], float) else row[c] for c in columns] for row in figures[key]]
            console.print(grid([c.replace("_", " ") for c in columns], rows, key))
        for rollout in figures["rollouts"]:
            # The gate's verdict names the boards too; on a terminal once is enough.
            for reason in rollout["reasons"][1:] or rollout["reasons"]:
                console.print(
                    f"version {rollout['version']}: {reason}", highlight=False, soft_wrap=not console.is_terminal
                )
        console.print(f"the controller sent {figures['controller_sent_bytes']} bytes; {figures['seconds']} s in all")

    def _traffic_table(self) -> Table:
        columns = ("application", "requests", "failed", "wrong version", "longest gap ms", "answers by version")
        rows = []
        for name, app in self.applications.items():
            t = app.tally
            versions = ", ".join(f"v{v}: {n}" for v, n in sorted(t.by_version.items()))
            rows.append((name, t.requests, t.failed, t.wrong_version, f"{t.longest_gap_ms:.0f}", versions))
        return grid(columns, rows)

    @contextlib.contextmanager
    def _shown(self) -> Iterator[Callable[[Group], None]]:
        """A live table on a terminal; elsewhere only its last state is printed."""
        with Live(console=console, refresh_per_second=4) as live:
            yield live.update

    def _say(self, what: str) -> None:
        console.print(
            f"[bold][{time.monotonic() - self._began:5.1f} s][/] {what}",
            highlight=False,
            soft_wrap=not console.is_terminal,
        )

    def _note(self, what: str) -> None:
        console.print(f"          {what}", highlight=False, soft_wrap=not console.is_terminal)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def _device(self, name: str) -> dict[str, Any]:
        return next(d for d in self.client.devices() if d["name"] == name)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_TIMEOUT_S
        while not condition():
            if time.monotonic() > end:
                raise EnvironmentProblem(f"not within {START_TIMEOUT_S:.0f} s: {what}")
            time.sleep(0.2)

    def _fleet(self, *arguments: str) -> None:
        done = subprocess.run([program("fleet"), *arguments, "--home", str(self._home)], capture_output=True, text=True)
        if done.returncode:
            raise EnvironmentProblem(f"fleet {arguments[0]} failed: {done.stderr.strip()}")

    def close(self) -> None:
        """Stop every process that was started."""
        for app in self.applications.values():
            app.stop()
        for board in self.boards.values():
            board.stop()
        if self._controller is not None and self._controller.poll() is None:
            self._controller.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._controller.wait(30)
            self._controller.kill()


def _class_figures(artifact: dict[str, Any]) -> dict[str, Any]:
    quality, timings = artifact["quality"], artifact["timings"]
    return {
        "name": artifact["class"],
        "engine": artifact["engine"],
        "arch": artifact["arch"],
        "float_bytes": quality["float_bytes"],
        "compiled_bytes": quality["compiled_bytes"],
        "agreement": quality["agreement"],
        "p50_ms": timings["p50_ms"],
        "p95_ms": timings["p95_ms"],
        "float_p50_ms": timings["float_p50_ms"],
    }


def _rollout_figures(state: dict[str, Any]) -> dict[str, Any]:
    touched = [b for b in state["boards"] if b["touched"]]
    reasons = [
        f"{b['device']}: {b['outcome']}: {b['reason']}" for b in touched if b["outcome"] not in (None, "succeeded")
    ]
    return {
        "version": state["version"],
        "outcome": state["phase"],
        "boards_selected": len(state["boards"]),
        "boards_touched": len(touched),
        "boards_rolled_back": sum(b["standing"] == "returned" for b in touched),
        "reasons": ([state["reason"]] if state["reason"] else []) + reasons,
    }


def _short_name(device_class: str) -> str:
    return device_class.removeprefix("x86-")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

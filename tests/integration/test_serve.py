"""``fleet``, the program: a fleet made, served and steered by its commands, by raw HTTPS, and by boards on the real broker."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID
from edgefleet_controller.sign import ReleaseSigner
from edgefleet_controller.transport.broker import find_mosquitto
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.clock import SystemClock
from edgefleet_shared.outcomes import Outcome
from support.broker import free_port, until
from support.fleet import FLEET, FakeBoard, Fleet, device_class, manifests, write


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A running controller with class ``pc`` registered."""
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    manifests(made.folder / "manifests")
    try:
        made.start()
        made.json("apply", "-f", str(made.folder / "manifests"))
        yield made
    finally:
        made.close()


def broker_pid(fleet: Fleet) -> int:
    return int(fleet.client().status()["broker_pid"])


def workers_of(pid: int) -> list[int]:
    """The compile workers among a process' children."""
    children = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [p for p in children if b"edgefleet_controller.compile.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------------------------------------------------- making a fleet


def test_a_second_init_is_refused_and_changes_nothing(tmp_path):
    made = Fleet(tmp_path)
    before = {p: p.read_bytes() for p in made.home.rglob("*") if p.is_file()}
    again = made.run("init")
    assert again.returncode == 1
    assert "there is a fleet in" in again.stderr
    assert "hint: " in again.stderr
    assert {p: p.read_bytes() for p in made.home.rglob("*") if p.is_file()} == before


def test_init_over_the_keys_of_an_unfinished_fleet_overwrites_none(tmp_path):
    made = Fleet(tmp_path)
    (made.home / "controller.yaml").unlink()
    key = (made.home / "ca" / "ca.key").read_bytes()
    assert made.run("init").returncode == 1
    assert (made.home / "ca" / "ca.key").read_bytes() == key


def test_private_files_are_for_the_owner_alone_and_the_server_keeps_no_operator_token(tmp_path):
    made = Fleet(tmp_path, "--signers", "3", "--threshold", "2")
    private = [*made.home.glob("keys/*/*.pem"), *made.home.glob("ca/*.key"), made.home / "operator.yaml"]
    assert len(private) == 6 + 3 + 3 + 1
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    token = yaml.safe_load((made.home / "operator.yaml").read_text())["token"]
    settings = (made.home / "controller.yaml").read_text()
    assert token not in settings
    assert hashlib.sha256(token.encode()).hexdigest() in settings


def test_a_threshold_that_no_number_of_keys_meets_is_refused_before_anything_is_made(tmp_path):
    home = tmp_path / "home"
    done = subprocess.run(
        [*FLEET, "init", "--home", str(home), "--signers", "1", "--threshold", "2", "--json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["code"] == "bad_input"
    assert not home.exists()


def test_init_takes_its_addresses_from_the_environment_and_certifies_them(tmp_path):
    home = tmp_path / "home"
    environment = {
        "EDGEFLEET_HOME": str(home), "EDGEFLEET_LISTEN": "0.0.0.0:8443", "EDGEFLEET_BROKER": "broker:8883",
        "EDGEFLEET_PUBLIC_URL": "https://controller:8443",
    }  # fmt: skip
    done = subprocess.run([*FLEET, "init"], capture_output=True, text=True, timeout=60, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    certificate = x509.load_pem_x509_certificate((home / "ca" / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"controller", "broker", "localhost"} <= set(names.get_values_for_type(x509.DNSName))


# ------------------------------------------------------------------------------------------------------------ serving it


@pytest.mark.parametrize("which", ["api_port", "broker_port"])
def test_a_taken_port_is_named_and_nothing_is_left_running(tmp_path, which):
    made = Fleet(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", getattr(made, which)))
        taken.listen()
        done = made.run("serve", timeout_s=60)
    assert done.returncode == 1
    assert f"127.0.0.1:{getattr(made, which)}" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (made.home / "broker" / "mosquitto.pid").exists()


def test_a_missing_broker_program_is_told_with_what_to_do(tmp_path):
    made = Fleet(tmp_path)
    # In a mount namespace of its own the program is no program; the machine keeps its own.
    hidden = ["unshare", "--map-root-user", "--mount", "sh", "-c", 'mount --bind /dev/null "$0" && exec "$@"']
    hidden.append(find_mosquitto())
    if subprocess.run([*hidden, "true"], capture_output=True).returncode != 0:
        pytest.skip("no right to a mount namespace here, so mosquitto can't be hidden")
    done = subprocess.run(
        [*hidden, *FLEET, "serve", "--home", str(made.home)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "mosquitto is not installed" in done.stderr
    assert "hint: install the Debian package mosquitto" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_second_controller_on_one_home_is_refused_and_the_first_serves_on(fleet):
    pid = broker_pid(fleet)
    done = fleet.run("serve", timeout_s=60, EDGEFLEET_LISTEN=f"127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "is in use by fleet serve" in done.stderr
    assert broker_pid(fleet) == pid
    assert alive(pid)


def test_sigterm_ends_the_controller_and_its_broker_in_order(tmp_path):
    made = Fleet(tmp_path).start()
    pid = broker_pid(made)
    assert made.end(signal.SIGTERM) == 0
    assert not alive(pid)
    for line in made.log().splitlines():
        assert {"at", "level", "event"} <= json.loads(line).keys()


def test_a_killed_broker_is_started_again_and_the_controller_reconnects(tmp_path):
    made = Fleet(tmp_path).start()
    pid = broker_pid(made)
    os.kill(pid, signal.SIGKILL)
    until(lambda: made.client().status()["broker_restarts"] == 1, "the broker was started again")
    until(lambda: bool(made.client().status()["broker_connected"]) and broker_pid(made) != pid, "reconnected")
    made.close()


# -------------------------------------------------------------------------------------------------------------- the API


def test_strangers_get_the_ca_certificate_and_nothing_else(fleet):
    with fleet.http() as http:
        assert http.get("/v1/ca").content == (fleet.home / "ca" / "ca.pem").read_bytes()
        routes = fleet.http(operator=True).get("/openapi.json").json()["paths"]
        closed = 0
        for path, methods in routes.items():
            for method in methods:
                if path in ("/v1/ca", "/v1/enroll"):
                    continue
                url = path.replace("{digest}", "sha256:" + "0" * 64).replace("{kind}", "pause")
                for name in ("{name}", "{model}", "{version}", "{job}"):
                    url = url.replace(name, "x")
                body = {"content": b"{}", "headers": {"content-type": "application/json"}}
                answer = http.request(method.upper(), url, **(body if method in ("post", "put") else {}))
                # A body that is no wish is answered before the question who asks; it does nothing either way.
                assert answer.status_code in (403, 422), (method, path, answer.status_code)
                closed += answer.status_code == 403
        assert closed >= 15
        assert http.get("/v1/status", headers={"Authorization": "Bearer wrong"}).json()["code"] == "untrusted"


def test_a_body_that_is_too_large_is_refused_before_it_is_parsed(fleet):
    with fleet.http() as http:
        answer = http.post(
            "/v1/enroll", content=b"[" * (17 * 1024 * 1024), headers={"content-type": "application/json"}
        )
    assert answer.status_code == 413
    assert answer.json()["code"] == "bad_input"


def test_errors_of_every_kind_have_the_shape_of_our_errors(fleet):
    with fleet.http(operator=True) as http:
        for answer, status, code in (
            (http.get("/v1/nothing"), 404, "not_found"),
            (http.post("/v1/tokens", json={}), 422, "bad_input"),
            (http.post("/v1/tokens", json={"device_class": "none"}), 404, "not_found"),
            (http.post("/v1/tokens", json={"device_class": "pc", "ttl_s": -1}), 422, "bad_input"),
            (http.get("/v1/blobs/rubbish"), 422, "bad_artifact"),
            (http.get("/v1/rollouts/none"), 404, "not_found"),
            (http.post("/v1/repo", json={"class-pc.json": "not base64!"}), 422, "bad_input"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
            assert answer.json().keys() == {"code", "message", "hint"}


def test_a_blob_is_kept_only_when_its_bytes_are_what_its_name_says(fleet):
    content = os.urandom(300_000)
    digest = digest_of(content)
    with fleet.http(operator=True) as http:
        wrong = http.put(f"/v1/blobs/{digest}", content=content[:-1] + b"x")
        assert wrong.status_code == 422
        assert http.head(f"/v1/blobs/{digest}").status_code == 404
        assert http.put(f"/v1/blobs/{digest}", content=content).status_code == 200
        assert http.get(f"/v1/blobs/{digest}").content == content
        part = http.get(f"/v1/blobs/{digest}", headers={"Range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, content[1000:2000])
        assert part.headers["content-range"] == "bytes 1000-1999/300000"
        assert http.get(f"/v1/blobs/{digest}", headers={"Range": "bytes=300000-"}).status_code == 416
    left = [p.name for p in (fleet.home / "artifacts" / "blobs" / "sha256").iterdir() if p.name.startswith(".")]
    assert left == []


def test_bytes_that_go_out_are_counted(fleet):
    content = os.urandom(500_000)
    digest = digest_of(content)
    with fleet.http(operator=True) as http:
        http.put(f"/v1/blobs/{digest}", content=content)
        before = http.get("/v1/status").json()["sent_bytes"]
        http.get(f"/v1/blobs/{digest}")
        assert http.get("/v1/status").json()["sent_bytes"] - before >= len(content)


def test_metadata_that_a_stranger_signed_is_not_taken(fleet, tmp_path):
    with fleet.http(operator=True) as http:
        targets = http.get("/v1/repo/targets.json").content
        stranger = Fleet(tmp_path)
        forged = ReleaseSigner(stranger.home / "keys" / "offline", SystemClock()).add_class(targets, "evil")
        answer = http.post("/v1/repo", json={n: base64.b64encode(c).decode() for n, c in forged.items()})
        assert (answer.status_code, answer.json()["code"]) == (403, "untrusted")
        assert http.get("/v1/repo/targets.json").content == targets
        assert http.get("/v1/repo/class-evil.json").status_code == 404


# ----------------------------------------------------------------------------------------------------------- enrolment


def test_a_token_enrols_one_board_once_under_the_name_that_the_token_gives(fleet):
    token = fleet.json("device", "token", "--class", "pc", "--site", "hall-1", "--name", "named-1")["token"]
    ca = x509.load_pem_x509_certificate((fleet.home / "ca" / "ca.pem").read_bytes())
    from cryptography.hazmat.primitives import hashes

    assert token.split(".")[:2] == ["efe", ca.fingerprint(hashes.SHA256()).hex()]
    assert fleet.enroll(token, "another-name")[0].status_code == 422
    answer, _ = fleet.enroll(token)
    told = answer.json()
    assert answer.status_code == 200
    assert told.keys() == {
        "device", "device_class", "site", "certificate", "ca", "root", "broker_host", "broker_port", "api_host", "api_port",
    }  # fmt: skip
    assert (told["device"], told["device_class"], told["site"]) == ("named-1", "pc", "hall-1")
    assert (told["broker_port"], told["api_host"], told["api_port"]) == (fleet.broker_port, "127.0.0.1", fleet.api_port)
    assert told["root"].encode() == (fleet.home / "repository" / "1.root.json").read_bytes()
    certificate = x509.load_pem_x509_certificate(told["certificate"].encode())
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "named-1"
    spent = fleet.enroll(token)[0]
    assert (spent.status_code, spent.json()["code"]) == (403, "untrusted")


def test_a_token_is_kept_when_the_request_was_bad_and_a_taken_name_is_refused(fleet):
    fleet.client().token("pc", device="taken-1")
    first = fleet.client().token("pc", device="taken-1")
    second = fleet.client().token("pc", device="taken-1")
    with fleet.http() as http:
        bad = http.post("/v1/enroll", json={"token": first, "device": "", "request": "rubbish"})
    assert (bad.status_code, bad.json()["code"]) == (422, "bad_input")
    assert fleet.enroll(first)[0].status_code == 200
    assert fleet.enroll(second)[0].status_code == 409


def test_a_board_reads_metadata_but_neither_blobs_it_was_not_assigned_nor_the_operators_pages(fleet):
    board = fleet.board("reader-1")
    content = b"not for everybody"
    with fleet.http(operator=True) as http:
        http.put(f"/v1/blobs/{digest_of(content)}", content=content)
    with fleet.http(certificate=board.certificate) as http:
        assert http.get("/v1/repo/timestamp.json").status_code == 200
        assert http.get(f"/v1/blobs/{digest_of(content)}").status_code == 403
        assert http.get("/v1/devices").status_code == 403


# ------------------------------------------------------------------------------------------------------------- commands


def test_applying_says_file_line_and_what_was_expected_and_changes_nothing(fleet, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(device_class("good-one")))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(device_class("bad-one")).replace("engine:", "motor:"))
    line = (tmp_path / "b.yaml").read_text().splitlines().index("  motor: onnxruntime") + 1
    done = fleet.run("apply", "-f", str(tmp_path))
    assert done.returncode == 2
    assert f"b.yaml, line {line}: spec.motor: unknown field; expected one of arch" in done.stderr
    assert "good-one" not in [c["metadata"]["name"] for c in fleet.client().classes()]


def test_applying_twice_is_the_same_as_once(fleet):
    before = fleet.client().metadata("targets.json")
    done = fleet.json("apply", "-f", str(fleet.folder / "manifests"))
    assert {row["kind"] for row in done} == {"DeviceClass", "Model", "Rollout"}
    assert fleet.client().metadata("targets.json") == before


def test_an_unknown_class_is_answered_with_the_known_ones(fleet):
    done = fleet.run("device", "token", "--class", "toaster")
    assert done.returncode == 2
    assert "no device class 'toaster'" in done.stderr
    assert "hint: known: " in done.stderr
    assert "pc" in done.stderr
    told = json.loads(fleet.run("device", "token", "--class", "toaster", "--json").stdout)
    assert told["error"]["code"] == "not_found"


def test_without_a_controller_the_commands_say_so(tmp_path):
    made = Fleet(tmp_path)
    done = made.run("device", "list")
    assert done.returncode == 1
    assert "can't reach the controller" in done.stderr
    assert "is fleet serve running?" in done.stderr
    (made.home / "operator.yaml").write_text("url: https://127.0.0.1:1\n")
    assert "must give url, token and ca" in made.run("device", "list").stderr
    assert "no /" in made.run("device", "list", "--home", str(tmp_path / "none")).stderr


def test_the_doctor_finds_a_key_that_others_may_read(fleet):
    assert all(f["ok"] for f in fleet.json("doctor"))
    key = fleet.home / "keys" / "online" / "director.pem"
    key.chmod(0o644)
    try:
        done = fleet.run("doctor", "--json")
        assert done.returncode == 1
        assert [f["what"] for f in json.loads(done.stdout) if not f["ok"]] == ["private keys"]
    finally:
        key.chmod(0o600)


# ------------------------------------------------------------------------------------- from a model to boards, end to end


@pytest.fixture(scope="module")
def released(fleet: Fleet) -> Fleet:
    """Versions 1 to 3 of model toy, added, compiled by the real toolchain, signed, all by command."""
    for version in ("1", "2", "3"):
        fleet.json("model", "add", "-f", str(fleet.folder / "manifests" / f"model-{version}.yaml"))
        shown = fleet.json("model", "compile", "toy", version, "--class", "pc")
        (artifact,) = shown["artifacts"]
        assert artifact["state"] == "signed"
        assert artifact["quality"]["agreement"] == 1.0
    return fleet


@pytest.fixture
def boards(released: Fleet, request: pytest.FixtureRequest) -> Iterator[list[FakeBoard]]:
    """Three fresh boards of class pc, named after the test."""
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:6]
    made = [released.board(f"{prefix}-{n}").start() for n in (1, 2, 3)]
    names = {b.name for b in made}
    until(
        lambda: names <= {d["name"] for d in released.client().devices() if d["online"] and d["state"]},
        "all have reported",
    )
    yield made
    for board in made:
        board.stop()


def rollout_for(fleet: Fleet, boards: list[FakeBoard], version: str, name: str, **spec: object) -> Path:
    given = yaml.safe_load((fleet.folder / "manifests" / "rollout.yaml").read_text())["spec"]
    return write(
        fleet.folder / f"{name}.yaml", "Rollout", name,
        given | {"version": version, "selector": {"devices": [b.name for b in boards]}} | spec,
    )  # fmt: skip


def test_a_rollout_goes_canary_first_and_succeeds_with_exit_status_zero(released, boards):
    path = rollout_for(released, boards, "1", "good")
    plan = released.json("rollout", "plan", "-f", str(path))
    assert sorted(row["wave"] for row in plan) == ["all", "all", "canary"]
    released.json("rollout", "create", "-f", str(path))
    done = released.run("rollout", "watch", "good", "--timeout", "60", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    state = json.loads(done.stdout)
    assert state["phase"] == "succeeded"
    assert {b["standing"] for b in state["boards"]} == {"took"}
    assert next(g["wave"] for g in state["gates"] if g["verdict"] == "passed") == "canary"
    manifest = boards[0].active.manifest
    with released.http(certificate=boards[0].certificate) as http:
        assert digest_of(http.get(f"/v1/blobs/{manifest}").content) == manifest
    assert released.json("device", "show", boards[0].name)["version"] == "1"
    assert "good" in [row["name"] for row in released.json("rollout", "list")]


def test_a_bad_version_stops_at_the_canary_which_returns_and_the_command_says_why(released, boards):
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "1", "before-bad")))
    assert released.run("rollout", "watch", "before-bad", "--timeout", "60").returncode == 0
    for board in boards:
        board.outcome_of = lambda version: Outcome.FAILED_ROLLED_BACK if version == "3" else Outcome.SUCCEEDED
    touched_before = {b.name: len(b.assigned) for b in boards}
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "3", "bad")))
    done = released.run("rollout", "watch", "bad", "--timeout", "60")
    assert done.returncode == 1
    assert "as the test says" in done.stdout
    state = released.client().rollout("bad")
    assert state["phase"] == "rolled_back"
    (canary,) = [b for b in state["boards"] if b["touched"]]
    untouched = [b for b in boards if b.name != canary["device"]]
    assert [len(b.assigned) for b in untouched] == [touched_before[b.name] for b in untouched]
    assert {b.active.version for b in boards} == {"1"}


def test_a_controller_killed_in_the_middle_of_a_rollout_goes_on_where_it_was(released, boards):
    for board in boards[1:] + boards[:1]:
        board.held = True
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "2", "cut")))
    until(lambda: any(b.assigned for b in boards), "the canary is assigned")
    before = {b["device"]: b["standing"] for b in released.client().rollout("cut")["boards"]}
    orphan = broker_pid(released)
    released.end(signal.SIGKILL)
    assert alive(orphan), "this test is about a broker that outlives its controller"
    for board in boards:
        board.held = False
    released.start()
    assert not alive(orphan)
    assert {b["device"]: b["standing"] for b in released.client().rollout("cut")["boards"]}.keys() == before.keys()
    done = released.run("rollout", "watch", "cut", "--timeout", "90", "--json")
    assert done.returncode == 0, done.stdout
    assert {b.active.version for b in boards} == {"2"}
    # The canary was asked once, by the controller that died; the one after it did not ask again under another name.
    assert [len(b.assigned) for b in boards] == [1, 1, 1]


def test_a_rollout_can_be_paused_resumed_and_aborted(released, boards):
    for board in boards:
        board.held = True
    released.json("rollout", "create", "-f", str(rollout_for(released, boards, "2", "steered")))
    until(lambda: any(b.assigned for b in boards), "the canary is assigned")
    released.json("rollout", "pause", "steered")
    until(lambda: released.client().rollout("steered")["phase"] == "paused", "paused")
    released.json("rollout", "resume", "steered")
    until(lambda: released.client().rollout("steered")["phase"] == "running", "running again")
    assert released.run("rollout", "watch", "steered", "--timeout", "1", "--json").returncode == 3
    held = released.run("rollout", "create", "-f", str(rollout_for(released, boards, "1", "second")))
    assert "held by another rollout" in held.stderr
    released.json("rollout", "abort", "steered")
    for board in boards:
        board.held = False
    until(lambda: released.client().rollout("steered")["phase"] in ("stopping", "aborted"), "stopping")


def test_a_selector_that_matches_no_board_is_refused(released, tmp_path):
    spec = {"model": "toy", "version": "1", "selector": {"sites": ["nowhere"]}}
    path = write(tmp_path / "r.yaml", "Rollout", "nobody", spec)
    done = released.run("rollout", "create", "-f", str(path))
    assert done.returncode == 2
    assert "matches no board" in done.stderr
    assert released.run("rollout", "status", "nobody").returncode == 2


def test_nothing_is_rolled_out_that_is_not_signed(fleet, tmp_path):
    source = yaml.safe_load((fleet.folder / "manifests" / "model-1.yaml").read_text())
    source["metadata"]["name"] = "unsigned"
    path = fleet.folder / "manifests" / "unsigned.yaml"
    path.write_text(yaml.safe_dump(source))
    try:
        fleet.json("model", "add", "-f", str(path))
        shown = fleet.json("model", "compile", "unsigned", "1", "--class", "pc", "--no-sign")
        assert [a["state"] for a in shown["artifacts"]] == ["compiled"]
        rollout = write(tmp_path / "r.yaml", "Rollout", "early", {"model": "unsigned", "version": "1"})
        done = fleet.run("rollout", "create", "-f", str(rollout))
        assert done.returncode == 1
        assert "compiled and signed" in done.stderr
        assert fleet.json("model", "sign", "unsigned", "1") == {"signed": ["pc"]}
    finally:
        path.unlink()


def test_a_version_never_changes(released):
    source = yaml.safe_load((released.folder / "manifests" / "model-2.yaml").read_text())
    path = released.folder / "changed.yaml"
    source["spec"]["source"]["path"] = "manifests/1.onnx"
    for split in ("calibration", "holdout", "golden"):
        source["spec"][split]["path"] = f"manifests/2-{split}.safetensors"
    path.write_text(yaml.safe_dump(source))
    done = released.run("model", "add", "-f", str(path))
    assert done.returncode == 1
    assert "give the changed model a new version" in done.stderr


def test_a_compile_job_that_was_running_when_the_controller_died_is_run_by_the_next(released):
    with released.http(operator=True) as http:
        answer = http.put("/v1/classes", json=device_class("pc-int8", precision="int8"))
        assert answer.status_code == 200
        job = released.client().compile("toy", "1", "pc-int8", despite_quality=True)
    assert released.process is not None
    controller = released.process.pid
    until(lambda: bool(workers_of(controller)), "the job has its process")
    orphans = workers_of(controller)
    released.end(signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in orphans), "the process of the dead controller's job ended")
    released.start()
    until(lambda: released.client().job(job)["state"] in ("done", "failed"), "the job ended", 120)
    told = released.client().job(job)
    assert told["state"] == "done", told["error"]
    assert told["manifest"].startswith("sha256:")

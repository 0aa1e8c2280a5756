"""``fleet``, the program: a fleet made, served and steered by its commands, by raw HTTPS, and by boards on the real broker."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import time

import pytest
import yaml
from cryptography import x509
from cryptography.x509.oid import NameOID
from edgefleet_controller.demo.boards import program
from edgefleet_controller.pki import ENROLLED_SLACK_S
from edgefleet_controller.sign import ReleaseSigner
from edgefleet_controller.transport.broker import find_mosquitto
from edgefleet_shared.artifact import digest_of
from edgefleet_shared.clock import SystemClock
from support.broker import free_port, until
from support.fleet import FLEET, Fleet, broker_pid, device_class
from support.processes import alive
from tuf.api.metadata import Metadata

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


def test_a_token_printed_into_a_file_enrols_the_real_agent(fleet, tmp_path):
    file = tmp_path / "board.token"
    file.write_text(fleet.run("device", "token", "--class", "pc", "--name", "by-file").stdout)
    enrol = [
        program("fleet-agent"),
        "enroll",
        "--url",
        f"https://127.0.0.1:{fleet.api_port}",
        "--token-file",
        str(file),
    ]
    done = subprocess.run([*enrol, "--state", str(tmp_path / "board")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "enrolled as by-file" in done.stdout
    again = subprocess.run([*enrol, "--state", str(tmp_path / "other")], capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "not valid" in again.stderr
    assert not (tmp_path / "other" / "agent.json").exists()


def test_boards_that_enrol_must_sign_unless_the_operator_trusts_unsigned_results(tmp_path):
    made = Fleet(tmp_path).start(EDGEFLEET_TRUST_UNSIGNED_RESULTS="true")
    try:
        (tmp_path / "class.yaml").write_text(yaml.safe_dump(device_class("pc")))
        made.json("apply", "-f", str(tmp_path / "class.yaml"))
        made.enroll(made.client().token("pc"), "lenient")
        assert made.json("device", "show", "lenient")["must_sign"] is False
        made.end()
        made.start()
        made.enroll(made.client().token("pc"), "strict")
        shown = {d["name"]: d["must_sign"] for d in made.json("device", "list")}
        assert shown == {"lenient": False, "strict": True}
    finally:
        made.close()


def test_a_token_is_kept_when_the_request_was_bad_and_a_taken_name_is_refused(fleet):
    fleet.client().token("pc", device="taken-1")
    first = fleet.client().token("pc", device="taken-1")
    second = fleet.client().token("pc", device="taken-1")
    with fleet.http() as http:
        bad = http.post("/v1/enroll", json={"token": first, "device": "", "request": "rubbish"})
    assert (bad.status_code, bad.json()["code"]) == (422, "bad_input")
    assert fleet.enroll(first)[0].status_code == 200
    assert fleet.enroll(second)[0].status_code == 409


def test_a_board_whose_card_died_is_revoked_and_enrolled_again_under_its_name(fleet):
    lost, begun = fleet.board("replaced-1"), time.time()
    refused, _ = fleet.enroll(fleet.client().token("pc", device="replaced-1"))
    assert "fleet device revoke replaced-1" in refused.json()["hint"]
    done = fleet.run("device", "revoke", "replaced-1")
    assert done.returncode == 0, done.stderr
    assert {b["name"]: b["revoked"] for b in fleet.json("device", "list")}["replaced-1"]
    refused_to_the_lost_one(fleet, lost)
    # A certificate tells whole seconds.
    until(lambda: time.time() > begun + ENROLLED_SLACK_S + 1, "the next enrolment is another one")
    successor = fleet.board("replaced-1", folder="its successor")
    assert not fleet.client().device("replaced-1")["revoked"]
    refused_to_the_lost_one(fleet, lost)
    with fleet.http(certificate=successor.certificate) as http:
        assert http.get("/v1/repo/timestamp.json").status_code == 200
    assert fleet.run("device", "revoke", "nobody").returncode == 2


def refused_to_the_lost_one(fleet, lost):
    with fleet.http(certificate=lost.certificate) as http:
        assert http.post("/v1/renew").status_code == 403
        assert http.get("/v1/repo/timestamp.json").status_code == 403


def test_a_card_that_was_copied_after_its_enrolment_is_told(fleet):
    board = fleet.board("copied-1").start()
    try:
        for turn in range(8):
            board.present(f"start-of-machine-{turn % 2}")
        until(lambda: "two machines" in fleet.client().device("copied-1")["problem"], "it is told")
        assert "two machines" in fleet.run("device", "list").stdout
    finally:
        board.stop()


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


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"options": {"platform": "x"}}, "bad-one: target onnxruntime has no option 'platform'; it has: "),
        ({"engine": "openvino", "target": "onnxruntime"}, "compiles for engine onnxruntime, not openvino"),
        ({"engine": "iree", "precision": "int8"}, "bad-one: target iree makes no int8; it makes fp32"),
    ],
)
def test_applying_tells_what_a_classs_target_does_not_make_and_changes_nothing(fleet, tmp_path, spec, told):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(device_class("good-one")))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(device_class("bad-one", **spec)))
    done = fleet.run("apply", "-f", str(tmp_path))
    assert done.returncode == 2
    assert told in done.stderr
    assert "good-one" not in [c["metadata"]["name"] for c in fleet.client().classes()]


def test_applying_a_class_whose_target_is_not_here_says_so(fleet, tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(device_class("elsewhere", engine="onxruntime")))
    done = fleet.run("apply", "-f", str(tmp_path))
    assert done.returncode == 0
    assert "DeviceClass elsewhere: registered" in done.stdout
    assert "here nothing compiles for it: onxruntime: no such target is installed" in done.stdout


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


def test_a_home_that_was_moved_or_restored_elsewhere_serves_and_is_reached_from_there(tmp_path):
    made = Fleet(tmp_path)
    before = Metadata.from_bytes((made.home / "repository/timestamp.json").read_bytes()).signed.version
    made.home = made.home.rename(tmp_path / "elsewhere")
    try:
        made.start()
        assert made.json("device", "list") == []
        until(
            lambda: Metadata.from_bytes((made.home / "repository/timestamp.json").read_bytes()).signed.version > before,
            "it signs anew",
        )
        refused = made.run("device", "token", "--class", "pc", "--ttl", "nan")
        assert refused.returncode == 2
        assert "can't be asked of the controller" in refused.stderr
        (made.home / "ca/ca.pem").rename(tmp_path / "ca.pem")
        assert "let ca name it there" in made.run("device", "list").stderr
        (tmp_path / "ca.pem").rename(made.home / "ca/ca.pem")
    finally:
        made.close()


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

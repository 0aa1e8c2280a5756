"""The trust path: each numbered check, by the attack that it stops."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from edgefleet_controller.sign import OFFLINE_LIFE, DirectorSigner, ReleaseSigner, Repository, make_key, read_key
from edgefleet_shared.artifact import Descriptor
from edgefleet_shared.assignment import AGENT, Subject
from edgefleet_shared.clock import ManualClock, utc
from edgefleet_shared.errors import EdgefleetError, TrustError
from edgefleet_shared.fingerprint import Fingerprint, Requirement
from edgefleet_shared.trust import Admission, Assignment, Floors, ImageRepository, Incomplete, admit, newest_root
from tuf.api.metadata import Metadata, Root

DAY = 86400.0
V1 = Descriptor("", "sha256:" + "1" * 64, 1000)
V2 = Descriptor("", "sha256:" + "2" * 64, 2000)
NEED = Requirement(arch="x86_64", engine="onnxruntime")
BOARD = Fingerprint(arch="x86_64", engines={"onnxruntime": "1.32.0"}, memory_bytes=1 << 30)


class Fleet:
    """A fleet's keys and repository, with two releases of one model for the class ``cam``."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        online = folder / "online"
        self.snapshot, self.timestamp, self.director_key = (
            make_key(online / f"{n}.pem") for n in ("snapshot", "timestamp", "director")
        )
        self.signer = ReleaseSigner(folder / "offline", self.clock)
        self.repository = Repository(folder / "repository", self.snapshot, self.timestamp, self.clock)
        first = self.signer.begin(self.snapshot, self.timestamp, self.director_key, signers=2, threshold=2)
        self.root = first["1.root.json"]
        self.repository.publish(first)
        self.repository.publish(self.signer.add_class(self.need("targets.json"), "cam"))
        self.release("1", V1)
        self.release("2", V2)
        self.director = DirectorSigner(self.director_key, self.clock)

    def need(self, name: str) -> bytes:
        content = self.repository.read(name)
        assert content is not None
        return content

    def release(self, version: str, manifest: Descriptor, model: str = "net") -> None:
        role = self.need("class-cam.json")
        self.repository.publish(
            self.signer.release(
                role, device_class="cam", model=model, version=version, manifest=manifest, requires=NEED
            )
        )

    def assignment(self, version: str = "1", manifest: Descriptor = V1, device: str = "b1") -> Assignment:
        return Assignment(
            id="a1", device=device, device_class="cam", rollout="r1", model="net", version=version,
            manifest=manifest.digest, size=manifest.size, issued_at=int(self.clock.now()),
        )  # fmt: skip

    def admit(
        self, desired: bytes, floors: Floors | None = None, board: Fingerprint = BOARD, root: bytes | None = None,
        files: dict[str, bytes] | None = None, subject: Subject = Subject.MODEL,
    ) -> Admission:  # fmt: skip
        floors = floors or Floors()
        read = (lambda name: files.get(name)) if files is not None else self.repository.read
        repository = ImageRepository(root or self.root, read, "cam", floors, self.clock.now())
        return admit(
            repository, desired, device="b1", device_class="cam", board=board, floors=floors, now=self.clock.now(),
            subject=subject,
        )  # fmt: skip


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def refused(check: str, fleet: Fleet, desired: bytes, **more: object) -> None:
    with pytest.raises(TrustError) as caught:
        fleet.admit(desired, **more)  # type: ignore[arg-type]
    assert caught.value.check == check, caught.value


def test_a_released_assigned_artifact_is_admitted_with_new_floors(fleet: Fleet) -> None:
    admission = fleet.admit(fleet.director.sign(fleet.assignment(), 7))
    assert admission.assignment.manifest == V1.digest
    assert admission.requires == NEED
    assert admission.floors.assignment_version == 7
    assert admission.floors.versions["class-cam"] == 3


def test_check_8_an_assignment_about_the_agent_is_none_about_a_model_and_the_reverse(fleet: Fleet) -> None:
    fleet.release("1", V1, AGENT)
    model = fleet.director.sign(fleet.assignment(), 1)
    agent = fleet.director.sign(msgspec.structs.replace(fleet.assignment(), model=AGENT), 2)
    refused("assignment_device", fleet, agent)
    refused("assignment_device", fleet, model, subject=Subject.AGENT)
    assert fleet.admit(agent, subject=Subject.AGENT).assignment.subject is Subject.AGENT


def test_check_9_each_subject_has_a_floor_of_its_own(fleet: Fleet) -> None:
    fleet.release("1", V1, AGENT)
    agent = msgspec.structs.replace(fleet.assignment(), model=AGENT)
    first, second = fleet.director.sign(agent, 2), fleet.director.sign(agent, 3)
    floors = fleet.admit(fleet.director.sign(fleet.assignment(), 9)).floors
    floors = fleet.admit(second, floors, subject=Subject.AGENT).floors
    assert (floors.assignment_version, floors.agent_version) == (9, 3)
    refused("assignment_fresh", fleet, first, floors=floors, subject=Subject.AGENT)
    refused("assignment_fresh", fleet, fleet.director.sign(fleet.assignment(), 8), floors=floors)


def next_root(fleet: Fleet, number: int) -> bytes:
    """The root after that of the number before: the same keys but for a new timestamp key, good for another year."""
    metadata: Metadata[Root] = Metadata.from_bytes(fleet.need(f"{number - 1}.root.json"))
    fleet.timestamp = make_key(fleet.repository.folder / f"../online/timestamp-{number}.pem")
    root = metadata.signed
    root.version, root.expires = number, utc(fleet.clock.now()) + OFFLINE_LIFE
    root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
    root.add_key(fleet.timestamp.public_key, "timestamp")
    metadata.signatures.clear()
    for path in sorted(fleet.signer.keys.glob("root-*.pem")):
        metadata.sign(read_key(path), append=True)
    content = metadata.to_bytes()
    (fleet.repository.folder / f"{number}.root.json").write_bytes(content)
    return content


def test_a_board_that_missed_several_roots_comes_to_the_newest_one_after_the_other(fleet: Fleet) -> None:
    roots = [fleet.root]
    for number in (2, 3):
        fleet.clock.advance(0.9 * OFFLINE_LIFE.total_seconds())
        roots.append(next_root(fleet, number))
    held = {"2.root.json": roots[1]}
    assert newest_root(fleet.root, held.get) == roots[1], "expired meanwhile: the next one may be on its way"
    held["3.root.json"] = roots[2]
    assert newest_root(fleet.root, held.get) == roots[2]
    assert newest_root(roots[1], held.get) == roots[2]


@pytest.mark.parametrize("wrong", [b"", b"junk", b"{}", None], ids=["empty", "junk", "an object", "a stranger's"])
def test_attack_no_root_is_come_to_that_its_predecessor_did_not_sign(
    fleet: Fleet, tmp_path: Path, wrong: bytes | None
) -> None:
    second, third = next_root(fleet, 2), next_root(fleet, 3)
    content = wrong if wrong is not None else next_root(Fleet(tmp_path / "stranger"), 2)
    assert newest_root(fleet.root, {"2.root.json": content}.get) == fleet.root
    assert newest_root(fleet.root, {"2.root.json": third, "3.root.json": third}.get) == fleet.root
    assert newest_root(fleet.root, {"2.root.json": second, "3.root.json": content}.get) == second


def test_check_1_a_root_of_a_stranger_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    stranger = Fleet(tmp_path / "stranger")
    refused("timestamp", fleet, fleet.director.sign(fleet.assignment(), 1), root=stranger.root)
    files = fleet.repository.files() | {"2.root.json": stranger.root}
    refused("root_chain", fleet, fleet.director.sign(fleet.assignment(), 1), files=files)


def test_check_2_a_frozen_timestamp_is_refused_when_it_has_expired(fleet: Fleet) -> None:
    desired = fleet.director.sign(fleet.assignment(), 1)
    fleet.clock.advance(15 * DAY)
    refused("timestamp", fleet, desired)
    fleet.repository.renew()
    fleet.admit(desired)


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json", "class-cam.json"])
def test_checks_2_to_5_one_changed_byte_in_any_metadata_is_refused(fleet: Fleet, name: str) -> None:
    desired = fleet.director.sign(fleet.assignment(), 1)
    files = fleet.repository.files()
    for at in range(10, len(files[name]), 97):
        content = bytearray(files[name])
        content[at] ^= 1
        with pytest.raises(EdgefleetError):
            fleet.admit(desired, files=files | {name: bytes(content)})


def test_check_3_metadata_that_is_still_on_its_way_is_waited_for_not_refused(fleet: Fleet) -> None:
    desired = fleet.director.sign(fleet.assignment(), 1)
    files = fleet.repository.files()
    for name in ("timestamp.json", "snapshot.json", "targets.json", "class-cam.json"):
        with pytest.raises(Incomplete):
            fleet.admit(desired, files={k: v for k, v in files.items() if k != name})
    fleet.release("3", Descriptor("", "sha256:" + "3" * 64, 3))
    newer = fleet.repository.files()
    for name in ("timestamp.json", "snapshot.json", "class-cam.json"):
        with pytest.raises(Incomplete):
            fleet.admit(desired, files=newer | {name: files[name]} if name != "timestamp.json" else files | {"snapshot.json": newer["snapshot.json"]})  # fmt: skip


def test_check_5_a_class_role_signed_with_the_online_keys_is_refused(fleet: Fleet) -> None:
    forged = json.loads(fleet.need("class-cam.json"))
    from edgefleet_controller.sign import _signed
    from tuf.api.metadata import Metadata

    metadata = Metadata.from_dict(forged)
    metadata.signed.version += 1
    content = _signed(metadata, [fleet.director_key])
    with pytest.raises(TrustError):
        fleet.repository.publish({"class-cam.json": content})


def test_check_6_a_replayed_older_publication_is_refused(fleet: Fleet) -> None:
    old = fleet.repository.files()
    fleet.release("3", Descriptor("", "sha256:" + "3" * 64, 3))
    floors = fleet.admit(fleet.director.sign(fleet.assignment(), 1)).floors
    refused("floor", fleet, fleet.director.sign(fleet.assignment(), 2), floors=floors, files=old)


def test_check_7_an_assignment_signed_by_anyone_else_is_refused(fleet: Fleet) -> None:
    forged = DirectorSigner(fleet.timestamp, fleet.clock).sign(fleet.assignment(), 1)
    refused("assignment_signature", fleet, forged)
    refused("assignment_signature", fleet, b"")
    refused("assignment_signature", fleet, b"[" * 20000)
    refused("assignment_signature", fleet, b"x" * 100_000)


def test_check_8_another_boards_assignment_is_refused(fleet: Fleet) -> None:
    refused("assignment_device", fleet, fleet.director.sign(fleet.assignment(device="b2"), 1))


def test_check_9_an_older_or_altered_assignment_is_refused_and_the_same_one_is_not(fleet: Fleet) -> None:
    first = fleet.director.sign(fleet.assignment("2", V2), 5)
    floors = fleet.admit(first).floors
    assert fleet.admit(first, floors=floors).floors == floors
    refused("assignment_fresh", fleet, fleet.director.sign(fleet.assignment("1", V1), 4), floors=floors)
    refused("assignment_fresh", fleet, fleet.director.sign(fleet.assignment("1", V1), 5), floors=floors)


def test_check_9_an_expired_assignment_is_refused_even_by_a_board_whose_clock_stands_still(fleet: Fleet) -> None:
    old = fleet.director.sign(fleet.assignment(), 1)
    fleet.clock.advance(100 * DAY)
    fleet.repository.renew()
    floors = fleet.admit(fleet.director.sign(fleet.assignment(), 2)).floors
    assert floors.clock == fleet.clock.now()
    fleet.clock.advance(-100 * DAY)
    refused("assignment_fresh", fleet, old, floors=msgspec.structs.replace(floors, assignment_version=0))


@pytest.mark.parametrize("ahead", [15 * DAY, 100 * 365 * DAY, 1e15], ids=["past the timestamp", "a century", "no date"])
def test_check_9_a_stolen_director_can_not_put_a_boards_clock_past_all_metadata(fleet: Fleet, ahead: float) -> None:
    signed = fleet.assignment()
    ahead_of_time = msgspec.structs.replace(signed, issued_at=signed.issued_at + int(ahead))
    refused("assignment_fresh", fleet, fleet.director.sign(ahead_of_time, 1))


def test_check_9_whatever_a_stolen_director_signed_metadata_that_is_renewed_is_taken_after_it(fleet: Fleet) -> None:
    signed = fleet.assignment()
    latest = msgspec.structs.replace(signed, issued_at=signed.issued_at + int(14 * DAY) - 1)
    floors = fleet.admit(fleet.director.sign(latest, 1)).floors
    fleet.clock.advance(8 * DAY)
    fleet.repository.renew()
    assert fleet.admit(fleet.director.sign(fleet.assignment("2", V2), 2), floors).assignment.version == "2"


def test_check_10_a_stolen_director_can_not_assign_what_was_never_released(fleet: Fleet) -> None:
    never = Descriptor("", "sha256:" + "9" * 64, 1000)
    refused("agreement", fleet, fleet.director.sign(fleet.assignment("9", never), 1))
    refused("agreement", fleet, fleet.director.sign(fleet.assignment("1", never), 1))
    refused("agreement", fleet, fleet.director.sign(fleet.assignment("1", Descriptor("", V1.digest, 999)), 1))


def test_check_11_a_board_without_the_engine_is_told_so_before_download(fleet: Fleet) -> None:
    bare = Fingerprint(arch="aarch64", engines={"tflite": "2.14"})
    with pytest.raises(TrustError, match=r"architecture x86_64.*engine onnxruntime"):
        fleet.admit(fleet.director.sign(fleet.assignment(), 1), board=bare)


def test_the_controller_takes_no_metadata_that_its_own_root_would_not(fleet: Fleet, tmp_path: Path) -> None:
    stranger = Fleet(tmp_path / "stranger")
    before = fleet.repository.files()
    for name in ("targets.json", "class-cam.json"):
        with pytest.raises(TrustError):
            fleet.repository.publish({name: stranger.need(name)})
    with pytest.raises(TrustError):
        fleet.repository.publish({"class-cam.json": fleet.need("class-cam.json")})
    assert fleet.repository.files() == before


def test_an_assignment_signed_anew_outlives_the_first_one_and_says_the_same(fleet: Fleet) -> None:
    first = fleet.director.sign(fleet.assignment(), 1)
    fleet.clock.advance(45 * DAY)
    fleet.repository.renew()
    second = fleet.director.renew(first, 2)
    floors = fleet.admit(first).floors
    fleet.clock.advance(50 * DAY)
    fleet.repository.renew()
    refused("assignment_fresh", fleet, first)
    admission = fleet.admit(second, floors)
    assert admission.assignment == fleet.admit(second).assignment
    assert admission.floors.assignment_version == 2
    refused("assignment_fresh", fleet, first, floors=admission.floors)

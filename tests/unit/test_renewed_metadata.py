"""The offline metadata before its end: signed anew with the same keys, taken by the repository, followed by boards."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_controller.sign import (
    OFFLINE_LIFE,
    ONLINE_LIFE,
    DirectorSigner,
    ReleaseSigner,
    Repository,
    make_key,
    read_key,
)
from edgefleet_shared.artifact import Descriptor
from edgefleet_shared.clock import ManualClock, utc
from edgefleet_shared.errors import NotFoundError, TrustError
from edgefleet_shared.fingerprint import Fingerprint, Requirement
from edgefleet_shared.trust import Assignment, Floors, ImageRepository, admit, newest_root
from tuf.api.metadata import Metadata, Root

MADE = Descriptor("", "sha256:" + "1" * 64, 1000)
LIFE_S = OFFLINE_LIFE.total_seconds()


class Fleet:
    """Keys and a repository with one class and one release."""

    def __init__(self, folder: Path, signers: int = 2, threshold: int = 2) -> None:
        self.clock = ManualClock()
        self.online = [make_key(folder / f"online/{name}.pem") for name in ("snapshot", "timestamp", "director")]
        self.signer = ReleaseSigner(folder / "offline", self.clock)
        self.repository = Repository(folder / "repository", self.online[0], self.online[1], self.clock)
        first = self.signer.begin(*self.online, signers=signers, threshold=threshold)
        self.root = first["1.root.json"]
        self.repository.publish(first)
        self.repository.publish(self.signer.add_class(self.need("targets.json"), "cam"))
        self.repository.publish(
            self.signer.release(
                self.need("class-cam.json"), device_class="cam", model="net", version="1", manifest=MADE, requires=Requirement(),
            )
        )  # fmt: skip

    def need(self, name: str) -> bytes:
        content = self.repository.read(name)
        assert content is not None
        return content

    def renew(self) -> list[str]:
        """As an operator does; returns which files were signed."""
        renewed = self.signer.renew(self.repository.root, self.repository.files())
        self.repository.publish(renewed)
        return sorted(renewed)

    def is_admitted(self, root: bytes) -> bool:
        wanted = Assignment(
            id="a1", device="b1", device_class="cam", rollout="r1", model="net", version="1", manifest=MADE.digest,
            size=MADE.size, issued_at=int(self.clock.now()),
        )  # fmt: skip
        desired = DirectorSigner(self.online[2], self.clock).sign(wanted, 1)
        try:
            repository = ImageRepository(root, self.repository.read, "cam", Floors(), self.clock.now())
        except TrustError:
            return False
        admitted = admit(
            repository, desired, device="b1", device_class="cam", board=Fingerprint(arch="x86_64"), floors=Floors(),
            now=self.clock.now(),
        )  # fmt: skip
        return admitted.assignment.id == "a1"


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_a_controller_that_was_restored_from_a_backup_signs_above_what_it_signed_since(fleet, tmp_path: Path) -> None:
    backup = fleet.repository.files()
    for _ in range(5):
        fleet.clock.advance(ONLINE_LIFE.total_seconds() * 0.6)
        fleet.repository.renew()
    board = ImageRepository(fleet.root, fleet.repository.read, "cam", Floors(), fleet.clock.now())
    floors = Floors(versions=board.versions)
    fleet.clock.advance(3600.0)
    for name, content in backup.items():
        (fleet.repository.folder / name).write_bytes(content)
    restored = Repository(fleet.repository.folder, fleet.online[0], fleet.online[1], fleet.clock)
    restored.renew(at_start=True)
    ImageRepository(fleet.root, restored.read, "cam", floors, fleet.clock.now())  # raises for what is below a floor


def test_a_fleet_lives_on_for_years_and_a_board_that_slept_through_them_comes_along(fleet: Fleet) -> None:
    assert fleet.renew() == [], "nothing is due"
    for year in range(5):
        fleet.clock.advance(0.7 * LIFE_S)
        fleet.repository.renew()
        assert fleet.renew() == sorted([f"{year + 2}.root.json", "class-cam.json", "targets.json"])
        assert fleet.renew() == []
        assert fleet.is_admitted(fleet.root)
        assert fleet.is_admitted(fleet.repository.root)
    assert newest_root(fleet.root, fleet.repository.read) == fleet.repository.root


def test_what_has_ended_already_is_renewed_as_well(fleet: Fleet) -> None:
    fleet.clock.advance(3 * LIFE_S)
    fleet.repository.renew()
    assert not fleet.is_admitted(fleet.root)
    fleet.renew()
    assert fleet.is_admitted(fleet.root)


def test_one_whose_keys_are_not_here_is_told_and_nothing_is_signed(fleet: Fleet) -> None:
    fleet.clock.advance(0.7 * LIFE_S)
    (fleet.signer.keys / "class-cam.pem").unlink()
    with pytest.raises(NotFoundError):
        fleet.renew()


def next_root(fleet: Fleet, change: str, others: Fleet) -> dict[str, bytes]:
    metadata: Metadata[Root] = Metadata.from_bytes(fleet.root)
    root, keys = metadata.signed, fleet.signer
    root.version, root.expires = 2, utc(fleet.clock.now()) + OFFLINE_LIFE
    if change == "skips a version":
        root.version = 3
    elif change == "names another timestamp key":
        root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
        root.add_key(others.online[1].public_key, "timestamp")
    elif change == "names other targets keys":
        for key in list(root.roles["targets"].keyids):
            root.revoke_key(key, "targets")
        for path in sorted(others.signer.keys.glob("targets-*.pem")):
            root.add_key(read_key(path).public_key, "targets")
    elif change == "is a stranger's":
        keys = others.signer
    metadata.signatures.clear()
    paths = sorted(keys.keys.glob("root-*.pem"))
    for path in paths[: 1 if change == "is signed by too few" else None]:
        metadata.sign(read_key(path), append=True)
    return {f"{root.version}.root.json": metadata.to_bytes()}


CHANGES = [
    "skips a version", "names another timestamp key", "names other targets keys", "is a stranger's", "is signed by too few",
    "has another's name", "is junk",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_attack_a_root_that_boards_could_not_follow_is_not_taken(fleet: Fleet, tmp_path: Path, change: str) -> None:
    wrong = next_root(fleet, change, Fleet(tmp_path / "others"))
    if change == "has another's name":
        wrong = {"7.root.json": wrong["2.root.json"]}
    elif change == "is junk":
        wrong = {"2.root.json": b"{}"}
    before = fleet.repository.files()
    with pytest.raises(TrustError):
        fleet.repository.publish(wrong)
    assert fleet.repository.files() == before
    assert fleet.repository.root == fleet.root


def test_a_good_next_root_is_taken(fleet: Fleet, tmp_path: Path) -> None:
    fleet.repository.publish(next_root(fleet, "", fleet))
    assert fleet.is_admitted(fleet.root)

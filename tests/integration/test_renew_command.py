"""``fleet renew``: root, targets and class metadata that come to their end, by command, while the controller runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from edgefleet_controller.release import add_class
from edgefleet_controller.sign import OFFLINE_LIFE, ReleaseSigner, read_key
from edgefleet_shared.clock import ManualClock, SystemClock, utc
from support.broker import until
from support.fleet import Fleet, device_class
from tuf.api.metadata import Metadata

NOW = SystemClock().now()
DAY_S = 86_400.0


@pytest.fixture
def aged(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet that was made almost a year ago: what its offline keys signed has ten days left."""
    fleet = Fleet(tmp_path)
    then = ManualClock(NOW - OFFLINE_LIFE.total_seconds() + 10 * DAY_S)
    keys, folder = fleet.home / "keys" / "offline", fleet.home / "repository"
    for name, role in (("1.root.json", "root"), ("targets.json", "targets")):
        metadata = Metadata.from_bytes((folder / name).read_bytes())
        metadata.signed.expires = utc(then.now()) + OFFLINE_LIFE
        metadata.signatures.clear()
        for path in sorted(keys.glob(f"{role}-*.pem")):
            metadata.sign(read_key(path), append=True)
        (folder / name).write_bytes(metadata.to_bytes())
    yield fleet.start()
    fleet.close()


def metadata_check(fleet: Fleet) -> dict:
    done = fleet.run("doctor", "--json")
    return next(found for found in json.loads(done.stdout) if found["what"] == "signed metadata")


def test_what_comes_to_its_end_is_told_and_renewed_for_boards_old_and_new(aged: Fleet) -> None:
    found = metadata_check(aged)
    assert not found["ok"]
    assert "1.root.json" in found["detail"]
    assert "fleet renew" in found["detail"]
    assert aged.json("renew")["signed"] == ["2.root.json", "targets.json"]
    assert metadata_check(aged)["ok"]
    assert aged.json("renew")["signed"] == []
    aged.client().put_class(device_class("pc"))
    add_class(aged.client(), ReleaseSigner(aged.home / "keys" / "offline", SystemClock()), "pc")
    answer, _ = aged.enroll(aged.client().token("pc", device="new"))
    assert Metadata.from_bytes(answer.json()["root"].encode()).signed.version == 2
    until(lambda: aged.client().metadata("class-pc.json"), "classes go on as before")


def test_without_the_keys_nothing_is_signed(aged: Fleet, tmp_path: Path) -> None:
    done = aged.run("renew", "--keys", str(tmp_path))
    assert done.returncode != 0
    assert "no root key" in done.stderr
    assert not metadata_check(aged)["ok"]

"""A compile worker on another machine: what it keeps on its disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from edgefleet_controller.compile.remote import RemoteWorker
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import ConflictError
from edgefleet_shared.work import CompileTask
from edgefleet_shared.work_loop import Held

DAY_S = 24 * 3600.0


class Client:
    """A controller's end that has blobs, and then takes the job back."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.meanwhile = layout, lambda: None

    def fetch(self, lease: str, digest: str, layout: Layout) -> None:
        self.meanwhile()
        if not layout.has(digest):
            raise ConflictError("that lease has ended")


def task(*blobs: str) -> CompileTask:
    return CompileTask(
        lease="l", lease_s=60.0, job="j", version="v", device_class="c", ship_despite_quality=False, builder=False, blobs=blobs
    )  # fmt: skip


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "blobs")


def kept(layout: Layout, content: bytes, unused_days: float) -> Path:
    path = layout.path(layout.put(content).digest)
    at = time.time() - unused_days * DAY_S
    os.utime(path, (at, at))
    return path


def do(worker: RemoteWorker, client: Any, *blobs: str) -> None:
    with pytest.raises(ConflictError):
        worker.carry_out(task(*blobs, "sha256:" + "0" * 64), Held(client, "l", 60.0))


def test_what_no_task_used_for_a_day_is_forgotten(layout: Layout, tmp_path: Path) -> None:
    client: Any = Client(layout)
    worker = RemoteWorker(client, layout, tmp_path / "cache", 1 << 30)
    old, recent = kept(layout, b"of last week", 7), kept(layout, b"of today", 0.5)
    cut = layout.path("sha256:" + "1" * 64).with_name(".fetch-1-cut")
    cut.write_bytes(b"half")
    os.utime(cut, (0, 0))
    do(worker, client)
    assert not old.exists()
    assert not cut.exists()
    assert recent.exists()


def test_what_a_task_uses_counts_as_used(layout: Layout, tmp_path: Path) -> None:
    client: Any = Client(layout)
    worker = RemoteWorker(client, layout, tmp_path / "cache", 1 << 30)
    used = kept(layout, b"a network that many classes are compiled from", 0.9)
    do(worker, client, f"sha256:{used.name}")
    assert time.time() - used.stat().st_mtime < 60


def test_nothing_is_forgotten_while_another_task_is_under_way(layout: Layout, tmp_path: Path) -> None:
    client: Any = Client(layout)
    worker = RemoteWorker(client, layout, tmp_path / "cache", 1 << 30)
    found: list[bool] = []

    def meanwhile() -> None:
        client.meanwhile = lambda: None
        result = kept(layout, b"what it made, as somebody made it long ago", 7)
        do(worker, client)
        found.append(result.exists())

    client.meanwhile = meanwhile
    do(worker, client)
    assert found == [True]

"""Stage 5, transport: blobs by multicast with repair. Receives wants, hands on chunks, each once for all who want it.

The idea of NORM (RFC 5740) over MQTT: boards subscribe to a digest and say which chunks they miss; the sender gathers wants
for a moment, publishes their union once, paced in bytes per second, and never more than the broker keeps up with. What a
board misses it simply wants again, so nothing here remembers boards. The controller's outgoing bytes do not grow with
their number.

A want is a stranger's word: it is held against what that board was assigned, and its size is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from edgefleet_shared import chunks, topics
from edgefleet_shared.artifact import Layout, chunk_count
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ArtifactError
from edgefleet_shared.messages import Want

GATHER_S = 0.25  # boards of one wave want the same blob within moments of each other
BACKLOG_LIMIT = 48  # chunks that the broker has not acknowledged
MAX_CHUNK_BYTES = 768 * 1024  # below the broker's packet limit
MIN_CHUNK_BYTES = 4096


@dataclass
class _Wanted:
    """Chunks of one blob that somebody misses. ``due`` is monotonic seconds: when the gathering ends."""

    chunk_bytes: int
    due: float
    numbers: set[int] = field(default_factory=set)


class BlobSender:
    """Sends wanted chunks from a layout.

    Args:
        publish: (topic, payload) to the broker.
        backlog: how many of our messages the broker has not acknowledged.
        permitted: whether that device may have that blob now (is it part of what it was assigned?).
        bytes_per_s: the pace.
    """

    def __init__(
        self,
        layout: Layout,
        publish: Callable[[str, bytes], None],
        backlog: Callable[[], int],
        permitted: Callable[[str, str], bool],
        clock: Clock,
        *,
        bytes_per_s: int,
    ) -> None:
        self._layout, self._publish, self._backlog, self._permitted = layout, publish, backlog, permitted
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._wanted: dict[tuple[str, int], _Wanted] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="blob-sender", daemon=True)
        self.sent_chunks = 0
        self.sent_bytes = 0
        self.refused_wants = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._wake.set()
        self._thread.join(5)

    def want(self, device: str, want: Want) -> None:
        """Take a board's want; one that it has no right to, or that makes no sense, is counted and dropped."""
        try:
            known = self._layout.has(want.digest) and self._permitted(device, want.digest)
        except ArtifactError:
            known = False
        if not known or not MIN_CHUNK_BYTES <= want.chunk_bytes <= MAX_CHUNK_BYTES:
            self.refused_wants += 1
            return
        last = chunk_count(self._layout.path(want.digest).stat().st_size, want.chunk_bytes) - 1
        with self._lock:
            key = (want.digest, want.chunk_bytes)
            entry = self._wanted.get(key)
            if entry is None:
                entry = self._wanted[key] = _Wanted(want.chunk_bytes, self._clock.monotonic() + GATHER_S)
            for first, to in want.missing:
                entry.numbers.update(range(max(0, first), min(to, last) + 1))
            if not entry.numbers:
                del self._wanted[key]
        self._wake.set()

    def _run(self) -> None:
        earned, then = 0.0, self._clock.monotonic()
        while not self._stopping.is_set():
            now = self._clock.monotonic()
            # A bucket of a quarter second: enough to use the pace, too little for a burst.
            earned = min(earned + (now - then) * self._bytes_per_s, max(self._bytes_per_s / 4, MAX_CHUNK_BYTES))
            then = now
            picked = self._pick(now)
            if picked is None:
                self._wake.clear()
                with self._lock:
                    pause = min((e.due - now for e in self._wanted.values()), default=1.0)
                self._wake.wait(max(0.005, min(pause, 1.0)))
                continue
            digest, chunk_bytes, number = picked
            if earned <= 0 or self._backlog() >= BACKLOG_LIMIT:
                self._put_back(digest, chunk_bytes, number)
                self._stopping.wait(0.005)
                continue
            with self._layout.path(digest).open("rb") as stream:
                stream.seek(number * chunk_bytes)
                piece = stream.read(chunk_bytes)
            message = chunks.pack(piece)
            earned -= len(message)
            self.sent_chunks += 1
            self.sent_bytes += len(message)
            self._publish(topics.chunk(digest, number), message)

    def _pick(self, now: float) -> tuple[str, int, int] | None:
        with self._lock:
            for (digest, chunk_bytes), entry in self._wanted.items():
                if entry.due <= now:
                    number = min(entry.numbers)
                    entry.numbers.discard(number)
                    if not entry.numbers:
                        del self._wanted[(digest, chunk_bytes)]
                    return digest, chunk_bytes, number
        return None

    def _put_back(self, digest: str, chunk_bytes: int, number: int) -> None:
        with self._lock:
            entry = self._wanted.setdefault((digest, chunk_bytes), _Wanted(chunk_bytes, 0.0))
            entry.numbers.add(number)

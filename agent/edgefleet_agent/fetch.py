"""Stage 5, transport: chunks into a candidate. Receives chunks from whichever transport, hands on blobs that hash to their digest.

Three rounds: the manifest (its size and digest are signed), the config (named by the manifest), the layers (whose every chunk's
hash stands in the config). Each layer chunk is checked as it comes, so a flipped byte costs one chunk; a blob gets its name
only when it is whole. What came is made safe from a cut every few seconds, and found again by a record of that (:mod:`edgefleet_agent.safe_chunks`), so
that a board that is never on for long gets there too. Without a record, as with blobs that another slot has, it is found by hashing it.

Memory: one chunk. Owned by the runner's thread; not handled here: connections.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from contextlib import suppress

from edgefleet_shared import atomic, chunks
from edgefleet_shared.artifact import (
    CHUNK_BYTES,
    MAX_CONFIG_BYTES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Layout,
    chunk_count,
    chunk_plan,
    digest_file,
    parse_manifest,
)
from edgefleet_shared.clock import Clock
from edgefleet_shared.errors import ArtifactError, EnvironmentProblem
from edgefleet_shared.messages import Want, ranges

from edgefleet_agent import safe_chunks

log = logging.getLogger(__name__)

WANT_AGAIN_S = 2.0  # silence after which the missing chunks are asked for again
WANT_AGAIN_LAST_S = 30.0
FALLBACK_S = 8.0  # silence after which HTTP is tried
SAFE_EVERY_S = 5.0  # by itself a kernel writes what it was given after half a minute
ALIVE_EVERY_S = 1.0
SPARE_BYTES = 16 * 1024 * 1024  # what must stay free beside the artifact


class _Blob:
    """One blob on its way: a file that is filled chunk by chunk, and which chunks are missing."""

    def __init__(
        self,
        layout: Layout,
        blob: Descriptor,
        hashes: tuple[str, ...] | None,
        chunk_bytes: int,
        alive: Callable[[], None],
    ) -> None:
        self._alive = alive
        self.blob, self.hashes, self.chunk_bytes = blob, hashes, chunk_bytes
        self.count = chunk_count(blob.size, chunk_bytes)
        if hashes is not None and len(hashes) != self.count:
            raise ArtifactError(f"blob {blob.digest} has {self.count} chunks, {len(hashes)} hashes were signed")
        self.files = layout.files
        self.final = layout.path(blob.digest)
        self.part = self.final.with_name(f".part-{self.final.name}")
        self.missing = set(range(self.count))
        self.unsafe_bytes = 0  # that came and may be lost with the power
        self._unrecorded = False  # something is there that no record names
        self._find_again()

    def length(self, number: int) -> int:
        return min(self.chunk_bytes, self.blob.size - number * self.chunk_bytes)

    @property
    def missing_bytes(self) -> int:
        return sum(map(self.length, self.missing))

    def _find_again(self) -> None:
        """Chunks that an interrupted fetch left behind: those that it made safe or, where it does not say, those that hash to what they
        should. Without chunk hashes there is nothing to go by."""
        if self.hashes is None:
            return
        safe = safe_chunks.read(self.final, self.count, self.chunk_bytes, files=self.files)
        if safe is None:
            self._find_by_hashing()
            return
        with atomic.disk_errors(self.part, "read"):
            there_bytes = self.files.size_bytes(self.part) or 0
        lost = {number for number in safe if number * self.chunk_bytes + self.length(number) > there_bytes}
        if lost:  # a record goes before its chunks do, so this is nobody's doing but the disk's
            safe_chunks.forget(self.final, files=self.files)
            self._find_by_hashing()
        else:
            self.missing -= safe

    def _find_by_hashing(self) -> None:
        with suppress(FileNotFoundError):
            pieces = atomic.pieces(self.part, files=self.files, size_bytes=self.chunk_bytes)
            for number, piece in zip(range(self.count), pieces, strict=False):
                if len(piece) == self.length(number) and self._good(number, piece):
                    self.missing.discard(number)
                    self._unrecorded = True
                self._alive()

    def _good(self, number: int, piece: bytes) -> bool:
        return self.hashes is None or hashlib.sha256(piece).hexdigest() == self.hashes[number]

    def take(self, number: int, message: bytes) -> bool:
        """Store a chunk if it is missing and right; returns whether it was."""
        piece = chunks.unpack(message, self.length(number)) if number in self.missing else None
        if piece is None or not self._good(number, piece):
            return False
        atomic.write_piece(self.part, piece, number * self.chunk_bytes, files=self.files)
        self.missing.discard(number)
        self.unsafe_bytes += len(piece)
        self._unrecorded = True
        return True

    def make_safe(self) -> int:
        """Have the next start find what came, whatever is cut; returns how many bytes of it are newly safe.

        Raises:
            EnvironmentProblem: the disk refused.
        """
        if not self._unrecorded or self.hashes is None:  # without hashes nothing of it would be found again
            return 0
        atomic.sync(self.part, files=self.files)
        self._record()
        made_safe, self.unsafe_bytes, self._unrecorded = self.unsafe_bytes, 0, False
        return made_safe

    def _record(self) -> None:
        safe = set(range(self.count)) - self.missing
        safe_chunks.write(self.final, safe, self.count, self.chunk_bytes, files=self.files)

    def finish(self, layout: Layout) -> bool:
        """All chunks are there: give the blob its name, if its bytes are what its digest says; else those that are not are missing again."""
        if self.blob.size == 0:
            layout.put(b"")
            return True
        # Also false when the file is longer than it should be: then its bytes hash to something else.
        try:
            whole = digest_file(self.part, files=self.files, alive=self._alive) == self.blob.digest
        except FileNotFoundError:
            whole = False
        if not whole:
            self._look_for_what_is_wrong()
            return False
        atomic.adopt(self.part, self.final, files=self.files)
        if self.hashes is not None:
            with suppress(EnvironmentProblem):  # then the next start hashes it
                self._record()
        return True

    def _look_for_what_is_wrong(self) -> None:
        """What was safe may have rotted since. Where that is not it, nothing of the file is to be gone by."""
        safe_chunks.forget(self.final, files=self.files)
        self.missing, self.unsafe_bytes, self._unrecorded = set(range(self.count)), 0, False
        if self.hashes is not None:
            self._find_by_hashing()
        if not self.missing or len(self.missing) == self.count:
            atomic.remove(self.part, files=self.files)
            self.missing, self._unrecorded = set(range(self.count)), False


class Fetcher:
    """Brings one artifact onto the board.

    Args:
        layout: where it goes.
        want: says which chunks are missing, to whoever sends.
        listen, unlisten: subscribe to a digest's chunks.
        fallback: (digest, size, chunk_bytes, missing chunk numbers): fetch these another way; None where there is none. Results come
            in through :meth:`chunk` too.
        alive: called once a second while what lies on the disk is hashed: of a gigabyte a slow one takes longer than a watchdog waits.
        quiet_s: for how long nothing has come of a message that is still under way. On a slow line one takes longer than silence is borne, and
            who asked again meanwhile would have all that is on its way sent a second time, before whatever comes next.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        want: Callable[[Want], None],
        listen: Callable[[str], None],
        unlisten: Callable[[str], None],
        fallback: Callable[[str, int, int, list[int]], None] | None,
        clock: Clock,
        alive: Callable[[], object] = lambda: None,
        quiet_s: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._layout, self._want, self._listen, self._unlisten = layout, want, listen, unlisten
        self._fallback, self._clock, self._quiet_s = fallback, clock, quiet_s
        self._say_alive, self._alive_at = alive, 0.0
        self._target: Descriptor | None = None
        self._blobs: dict[str, _Blob] = {}
        self._round = 0
        self._heard_at = self._asked_at = self._fell_back_at = self._made_safe_at = 0.0
        self._pause_s = WANT_AGAIN_S
        self.finished = False
        self.done_bytes = self.total_bytes = 0
        self.safe_bytes = 0  # that came since the beginning and that a next start will find, whatever is cut
        self.bad_chunks = 0

    @property
    def busy(self) -> bool:
        return self._target is not None and not self.finished

    def begin(self, manifest: str, size: int) -> None:
        """Start on an artifact.

        Raises:
            ArtifactError: it can't be one. EnvironmentProblem: no space.
        """
        self.stop()
        if not 0 < size <= MAX_MANIFEST_BYTES:
            raise ArtifactError(f"a manifest of {size} bytes is not accepted")
        self._target = Descriptor("", manifest, size)
        self.finished, self._round = False, 0
        self._heard_at = self._fell_back_at = self._made_safe_at = self._clock.monotonic()
        self._pause_s = WANT_AGAIN_S
        self.done_bytes, self.total_bytes, self.bad_chunks, self.safe_bytes = 0, size, 0, 0
        self._open([(self._target, None, CHUNK_BYTES)])
        self._go_on()

    def stop(self) -> None:
        """Give up what is under way; what was fetched stays for the next time."""
        for digest in self._blobs:
            self._unlisten(digest)
        self._blobs = {}
        self._target = None

    def chunk(self, digest: str, number: int, message: bytes) -> bool:
        """Take a chunk, as it is or packed; one that is not wanted or not what was signed is dropped. Returns whether it helped.

        Raises:
            ArtifactError: the artifact contradicts itself. EnvironmentProblem: disk full or read-only.
        """
        blob = self._blobs.get(digest)
        if blob is None:
            return False
        if not blob.take(number, message):
            self.bad_chunks += number in blob.missing
            return False
        self.done_bytes += blob.length(number)
        self._heard_at = self._clock.monotonic()
        self._pause_s = WANT_AGAIN_S
        if not blob.missing:
            self._go_on()
        return True

    def tick(self) -> None:
        """Make safe what came. Ask again after silence; fall back to HTTP after more of it. Neither puts the other off: each may be the
        one way there is.

        Raises:
            EnvironmentProblem: the disk refused.
        """
        if not self.busy:
            return
        now = self._clock.monotonic()
        if now - self._made_safe_at >= SAFE_EVERY_S:
            self._made_safe_at = now
            self.make_safe()
        if min(now - max(self._heard_at, self._asked_at), self._quiet_s()) >= self._pause_s:
            self._pause_s = min(self._pause_s * 1.5, WANT_AGAIN_LAST_S)
            self._ask()
        if self._fallback is not None and now - max(self._heard_at, self._fell_back_at) >= FALLBACK_S:
            self._fell_back_at = now
            for digest, blob in self._blobs.items():
                self._fallback(digest, blob.blob.size, blob.chunk_bytes, sorted(blob.missing))
                break  # one at a time: this is the slow way

    def make_safe(self) -> None:
        """Have the next start find what came so far, whatever is cut.

        Raises:
            EnvironmentProblem: the disk refused.
        """
        self.safe_bytes += sum(blob.make_safe() for blob in self._blobs.values())

    def _open(self, blobs: list[tuple[Descriptor, tuple[str, ...] | None, int]]) -> None:
        opened: dict[str, _Blob] = {}
        for descriptor, hashes, chunk_bytes in blobs:
            if descriptor.digest in opened:
                continue
            if self._lies_whole(descriptor, hashes is not None, chunk_bytes):
                self.done_bytes += descriptor.size
                continue
            blob = _Blob(self._layout, descriptor, hashes, chunk_bytes, self._alive)
            self.done_bytes += descriptor.size - blob.missing_bytes
            opened[descriptor.digest] = blob
        # What lies here already, of an earlier try or of another slot, takes no space a second time.
        self._need_space(sum(blob.missing_bytes for blob in opened.values()))
        for digest, blob in opened.items():
            self._blobs[digest] = blob
            self._listen(digest)
        self._ask()

    def _lies_whole(self, descriptor: Descriptor, chunked: bool, chunk_bytes: int) -> bool:
        """Whether another slot, or an earlier try, has the blob already. One that rotted is removed, to be fetched again; one that can't be
        read is fetched over it: perhaps it can be read tomorrow, by the slot that has it. Of a ``chunked`` one it is remembered."""
        if not self._layout.has(descriptor.digest):
            return False
        path, files = self._layout.path(descriptor.digest), self._layout.files
        count = chunk_count(descriptor.size, chunk_bytes)
        if chunked and safe_chunks.lies_whole(path, count, chunk_bytes, files=files):
            return True
        try:
            self._layout.check(descriptor, alive=self._alive)
        except ArtifactError:
            atomic.remove(self._layout.path(descriptor.digest), files=self._layout.files)
            return False
        except EnvironmentProblem as exc:
            if not atomic.is_broken(exc):
                raise
            log.warning("blob unreadable", extra={"digest": descriptor.digest, "reason": str(exc)})
            return False
        if chunked:
            with suppress(EnvironmentProblem):  # then the next start hashes it again
                safe_chunks.write(path, range(count), count, chunk_bytes, files=files)
        return True

    def _alive(self) -> None:
        now = self._clock.monotonic()
        if now - self._alive_at >= ALIVE_EVERY_S:
            self._alive_at = now
            self._say_alive()

    def _ask(self) -> None:
        self._asked_at = self._clock.monotonic()
        for blob in self._blobs.values():
            if blob.missing:
                wanted = ranges(sorted(blob.missing))
                self._want(Want(digest=blob.blob.digest, chunk_bytes=blob.chunk_bytes, missing=wanted))

    def _go_on(self) -> None:
        """Name what is whole; when a round is whole, open the next one."""
        while True:
            for digest, blob in list(self._blobs.items()):
                if not blob.missing:
                    if blob.finish(self._layout):
                        self.safe_bytes += blob.unsafe_bytes
                        self._unlisten(digest)
                        del self._blobs[digest]
                    else:
                        self.done_bytes -= blob.missing_bytes
                        self.bad_chunks += 1
                        self._ask()
            if self._blobs or self._target is None or self.finished:
                return
            self._round += 1
            self._next_round(self._target)

    def _next_round(self, target: Descriptor) -> None:
        self._heard_at = self._clock.monotonic()
        manifest = parse_manifest(self._layout.read(target.digest, MAX_MANIFEST_BYTES))
        if self._round == 1:
            self.total_bytes = target.size + sum(blob.size for blob in manifest.blobs())
            if manifest.config.size > MAX_CONFIG_BYTES:
                raise ArtifactError(f"a config of {manifest.config.size} bytes is not accepted")
            self._open([(manifest.config, None, CHUNK_BYTES)])
        elif self._round == 2:
            chunks, chunk_bytes = chunk_plan(manifest, self._layout.read(manifest.config.digest, MAX_CONFIG_BYTES))
            self._open([(b, chunks.get(b.digest, ()), chunk_bytes) for b in manifest.layers])
        else:
            # A name may come from a start that was stopped before it had made the name durable.
            self._layout.sync()
            self.finished = True

    def _need_space(self, wanted: int) -> None:
        if not wanted:
            return
        folder = self._layout.root
        with atomic.disk_errors(folder, "measure"):
            free = self._layout.files.free_bytes(folder)
        if free < wanted + SPARE_BYTES:
            raise EnvironmentProblem(
                f"the artifact needs {wanted} bytes and {SPARE_BYTES} to spare, {free} are free on the disk",
                hint="free some space on the board; the rollout can be tried again",
            )

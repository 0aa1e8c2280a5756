"""The demo's applications: receive a board's runtime and real photos, hand on what every answer was.

One thread per board sends one photo after another by the Open Inference Protocol (binary tensors over the Unix socket), at a steady
pace, from the moment the board first serves until the end. Nothing is retried: a failed request is a failed request.

Wrong answers are found two ways. By name: a version that was never committed anywhere (the broken ones), or an older one after
a newer one had been committed on that board. By content: the numbers of an answer must be those that the version which
it names gives for that photo, and not those of another version.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

PACE_S = 0.15
SAME = 1e-6  # relative to the spread of an answer's scores: below it two answers are the same numbers

Floats = npt.NDArray[np.float32]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


class Truths:
    """What each version of a class answers to each photo, learned from the first answer that named it.

    The first answers of a version come while it is the only new thing on one board; from then on every other answer of any
    board of the class is held against them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], dict[str, Floats]] = {}
        self._lock = threading.Lock()

    def contradicts(self, device_class: str, photo: int, version: str, scores: Floats) -> bool:
        """Whether the numbers are another version's rather than those of the version that the answer names."""
        with self._lock:
            known = self._known.setdefault((device_class, photo), {})
            others = [_distance(vector, scores) for name, vector in known.items() if name != version]
            if version not in known:
                known[version] = scores
                return min(others, default=1.0) <= SAME
            # Two builds of one network answer alike; what gives one away is being nearer to another's numbers than to its own.
            return min(others, default=1.0) < _distance(known[version], scores)


def _distance(a: Floats, b: Floats) -> float:
    """The largest difference, relative to the spread of the scores."""
    if a.shape != b.shape:
        return 1.0
    return float(np.max(np.abs(a - b))) / (float(np.ptp(a)) or 1.0)


@dataclass
class Tally:
    """What one board's application saw. Times in ms; the gap is between two successive good answers, pace included."""

    requests: int = 0
    failed: int = 0
    wrong_version: int = 0
    by_version: Counter[str] = field(default_factory=Counter)
    longest_gap_ms: float = 0.0
    first_failure: str = ""
    last_version: str = ""


class Application:
    """One board's steady stream.

    Args:
        photos: encoded, N x C x H x W float32.
        never: versions that must never answer.
    """

    def __init__(
        self,
        board: str,
        device_class: str,
        path: Path,
        model: str,
        photos: Floats,
        truths: Truths,
        never: frozenset[str],
    ) -> None:
        self.tally = Tally()
        self._board, self._class, self._path = board, device_class, path
        self._truths, self._never = truths, never
        self._url = f"/v2/models/{model}/infer"
        self._bodies = [_request(photo) for photo in photos]
        self._committed = 0
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"app-{board}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._halt.set()
        self._thread.join(70)

    def committed(self, version: int) -> None:
        """The board committed this version: an older one must not answer any more."""
        self._committed = max(self._committed, version)

    def _run(self) -> None:
        connection = _UnixConnection(self._path)
        last_good: float | None = None
        count = 0
        while not self._halt.wait(PACE_S):
            photo = count % len(self._bodies)
            count += 1
            content, headers = self._bodies[photo]
            expected_floor = self._committed
            self.tally.requests += 1
            try:
                connection.request("POST", self._url, content, headers)
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != 200:
                    raise http.client.HTTPException(f"{answer.status}: {body[:200].decode(errors='replace')}")
                version, scores = _answer(body, int(answer.headers["Inference-Header-Content-Length"]))
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
                self.tally.failed += 1
                self.tally.first_failure = self.tally.first_failure or repr(exc)
                connection.close()
                continue
            now = time.monotonic()
            if last_good is not None:
                self.tally.longest_gap_ms = max(self.tally.longest_gap_ms, (now - last_good) * 1000)
            last_good = now
            self.tally.by_version[version] += 1
            self.tally.last_version = version
            stale = not version.isdecimal() or int(version) < expected_floor or version in self._never
            if stale or self._truths.contradicts(self._class, photo, version, scores):
                self.tally.wrong_version += 1
        connection.close()


def _request(photo: Floats) -> tuple[bytes, dict[str, str]]:
    raw = np.ascontiguousarray(photo[None], np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "input",
                    "datatype": "FP32",
                    "shape": [1, *photo.shape],
                    "parameters": {"binary_data_size": len(raw)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    return head + raw, headers


def _answer(body: bytes, head_bytes: int) -> tuple[str, Floats]:
    head = json.loads(body[:head_bytes])
    return str(head["model_version"]), np.frombuffer(body[head_bytes:], np.float32)

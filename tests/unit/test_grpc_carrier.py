"""Leave is taken of a gRPC client between two frames, and nowhere else."""

from __future__ import annotations

import random

from edgefleet_agent.runtime.grpc_carrier import Frames


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1]) + content


def test_wherever_what_is_said_is_torn_the_frames_ends_are_found() -> None:
    said = [frame(bytes(size)) for size in (18, 0, 70_000, 1, 0, 0, 300)]
    ends = {sum(map(len, said[: count + 1])) for count in range(len(said))}
    whole = b"".join(said)
    for seed in range(50):
        draw = random.Random(seed)
        frames, at = Frames(), 0
        while at < len(whole):
            piece = whole[at : at + draw.choice((1, 2, 8, 9, 10, 100, 65_536))]
            first = frames.feed(piece)
            wanted = [end - at for end in sorted(ends) if at < end <= at + len(piece)]
            assert first == (wanted[0] if wanted else None)
            at += len(piece)
            assert frames.between == (at in ends)


def test_nothing_comes_before_a_servers_settings() -> None:
    frames = Frames()
    assert not frames.between
    assert frames.feed(frame(bytes(30))[:20]) is None
    assert not frames.between

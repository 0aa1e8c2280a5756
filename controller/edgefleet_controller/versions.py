"""Stage 3, sign: versions of what is signed online. Receives the last version and the time, hands on the next one. Pure.

Boards take nothing below a version that they took before, and a controller that was restored from a backup does not know what it signed since. So
a version is at least the minutes since 1970: whatever was signed before the loss is below, unless one board was sent more than one assignment a minute
for as long as the controller was away.
"""

from __future__ import annotations

MINUTE_S = 60.0


def least(now: float) -> int:
    """What a version that is signed now (seconds since 1970) is at least."""
    return int(now // MINUTE_S)


def after(version: int, now: float) -> int:
    """The version after that one; a clock that was set back lowers none."""
    return max(version + 1, least(now))

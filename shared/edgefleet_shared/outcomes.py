"""How a deployment to one board ends, told truthfully. Pure.

The agent reports all but ``lost``, which only the controller can know.
"""

from __future__ import annotations

from edgefleet_shared.open_enum import OpenEnum


class Outcome(OpenEnum):
    SUCCEEDED = "succeeded"  # committed: accepted, swapped, soaked
    FAILED_NO_CHANGE = "failed_no_change"  # stopped before the swap; the old artifact never stopped serving
    FAILED_ROLLED_BACK = "failed_rolled_back"  # swapped, did not hold, the old artifact serves again
    FAILED_UNABLE_TO_ROLL_BACK = "failed_unable_to_roll_back"  # swapped, did not hold, and nothing to return to runs
    REJECTED = "rejected"  # refused before or after download: trust, or a board it does not fit
    TIMED_OUT = "timed_out"  # not finished in the time that the assignment gives
    SUPERSEDED = "superseded"  # another assignment took its place
    LATE_REGRESSION = "late_regression"  # had succeeded, failed after commit, the previous artifact serves again
    LOST = "lost"  # never heard of again (controller's word)


ENDED_WELL = frozenset({Outcome.SUCCEEDED})
# The artifact (or the board) is at fault; superseded is nobody's fault and counts for neither side.
ENDED_BADLY = frozenset(
    {
        Outcome.FAILED_NO_CHANGE,
        Outcome.FAILED_ROLLED_BACK,
        Outcome.FAILED_UNABLE_TO_ROLL_BACK,
        Outcome.REJECTED,
        Outcome.TIMED_OUT,
        Outcome.LATE_REGRESSION,
        Outcome.LOST,
    }
)

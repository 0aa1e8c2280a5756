"""Identity: a worker's certificate. Receives how another one is asked for, keeps one that is good for months, beside the work.

Compile workers and builder boards share it: standard library only. The rule is that of boards (:func:`edgefleet_shared.certificates.is_due`):
the key stays, one file changes in one step, and the controller lets the worker in by the old one until it has shown the new one. The next
call shows that; what is on the line meanwhile is not disturbed.

Not handled here: a certificate that has ended gets nobody in: such a worker is revoked and enrolled again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from edgefleet_shared.certificates import AGAIN_LAST_S, LOOK_S
from edgefleet_shared.errors import EdgefleetError
from edgefleet_shared.work_client import WorkClient

log = logging.getLogger(__name__)


def keep_renewed(
    stopping: threading.Event, client: WorkClient, renew: Callable[[], str], *, look_s: float = LOOK_S
) -> None:
    """Look at the certificate, and have another one when it is due, until told to stop.

    Args:
        renew: another certificate (PEM) for the same key; blocks; raises EdgefleetError.
        look_s: between two looks; what failed is tried ever more seldom, and at least each ``AGAIN_LAST_S``.
    """
    again_s = look_s
    while not stopping.is_set():
        pause_s = look_s
        try:
            if client.renewal_is_due(time.time()):
                client.adopt(renew())
                log.info("certificate renewed")
                # If it is due at once again, it is the clock that is wrong.
                pause_s, again_s = AGAIN_LAST_S, look_s
        except (EdgefleetError, OSError) as exc:  # OSError: a file of the identity is not there
            log.warning("certificate not renewed", extra={"reason": str(exc)})
            pause_s, again_s = again_s, min(2 * again_s, AGAIN_LAST_S)
        stopping.wait(pause_s)

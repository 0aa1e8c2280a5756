"""``fleet serve``: receives settings, runs the controller and its API until it is told to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import Any

from edgefleet_shared import atomic, logs

from edgefleet_controller import notify
from edgefleet_controller.api.server import ApiServer
from edgefleet_controller.controller import Controller
from edgefleet_controller.settings import Settings

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Run the controller until SIGTERM or SIGINT.

    Raises:
        EdgefleetError: it could not start; everything that was started is stopped again.
    """
    logs.configure()
    # A dead thread must not leave a controller that is half alive: systemd starts a whole one.
    threading.excepthook = _fatal
    with atomic.lock(settings.home, "fleet serve"):
        controller = Controller(settings)
        server = ApiServer(controller)
        server.refuse_taken_port()
        # Before anything is started: a signal meanwhile must not leave a broker behind.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        try:
            controller.start()
            server.run(lambda: _ready(settings))
        finally:
            notify.send("STOPPING=1")
            controller.stop()


def _ready(settings: Settings) -> None:
    notify.send("READY=1")
    log.info(
        "controller ready", extra={"url": settings.public_url, "broker": ":".join(map(str, settings.broker_address))}
    )


def _fatal(args: Any) -> None:
    try:
        log.critical(
            "thread died", exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
            extra={"of": args.thread.name if args.thread else ""},
        )  # fmt: skip
    finally:
        os._exit(70)

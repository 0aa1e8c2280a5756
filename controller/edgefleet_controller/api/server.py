"""The HTTPS server: receives the controller, hands on its API to clients whose certificate, if they show one, is known.

uvicorn does not tell an application its client's certificate; the protocol below puts its common name into the scope. Certificates are
optional here: operators show a token, boards show the certificate of their enrolment.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from edgefleet_shared.errors import EnvironmentProblem
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from edgefleet_controller.api.routes import build_api
from edgefleet_controller.controller import Controller


class _CertificateProtocol(HttpToolsProtocol):
    """Adds ``extensions["edgefleet.client"]``: the verified certificate (DER), its common name and serial number (lower hex), or empty ones."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        certificate = self.transport.get_extra_info("peercert") or {}
        names = [v for part in certificate.get("subject", ()) for k, v in part if k == "commonName"]
        serial = str(certificate.get("serialNumber", "")).lower().lstrip("0")
        tls = self.transport.get_extra_info("ssl_object")
        shown: dict[object, object] = {
            "name": names[0] if names else "",
            "serial": serial,
            "certificate": (tls.getpeercert(binary_form=True) if tls else None) or b"",
        }
        self.scope["extensions"] = {"edgefleet.client": shown}


class _Server(uvicorn.Server):
    """Tells when it is up; leaves signals to the program."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready: Callable[[], None] = lambda: None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """uvicorn with the fleet's certificates, run on the calling thread."""

    def __init__(self, controller: Controller) -> None:
        self._settings = controller.settings
        ca = self._settings.home / "ca"
        self._server = _Server(
            uvicorn.Config(
                build_api(controller),
                host=self._settings.listen_host,
                port=self._settings.listen_port,
                http=_CertificateProtocol,
                ssl_certfile=str(ca / "server.pem"),
                ssl_keyfile=str(ca / "server.key"),
                ssl_ca_certs=str(ca / "ca.pem"),
                ssl_cert_reqs=ssl.CERT_OPTIONAL,
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
            )
        )

    def refuse_taken_port(self) -> None:
        """Raises EnvironmentProblem before anything else is started."""
        host, port = self._settings.listen_host, self._settings.listen_port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as exc:
                raise EnvironmentProblem(
                    f"the API can't listen on {host}:{port}: {exc.strerror}",
                    hint="choose another address (listen in controller.yaml), or stop what listens there",
                ) from exc

    def run(self, ready: Callable[[], None]) -> None:
        self._server.ready = ready
        self._server.run()

    def stop(self) -> None:
        self._server.should_exit = True

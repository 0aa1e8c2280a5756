"""Is the program in this container alive? Receives one address, hands on an exit status: 0 yes, 1 no.

``http://HOST:PORT/PATH`` wants status 200; ``tls://HOST:PORT`` wants a finished TLS handshake, which an event loop that
hangs never gives. The certificate is not checked: this asks for life, not for identity.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import sys
from urllib.parse import urlsplit

TIMEOUT_S = 4.0


def alive(address: str) -> bool:
    """Whether the program at ``address`` answers within :data:`TIMEOUT_S`."""
    parts = urlsplit(address)
    if parts.hostname is None or parts.port is None:
        raise SystemExit(f"not an address with host and port: {address}")
    try:
        if parts.scheme == "tls":
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            with (
                socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S) as line,
                context.wrap_socket(line),
            ):
                return True
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
        try:
            connection.request("GET", parts.path or "/")
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


if __name__ == "__main__":
    sys.exit(0 if alive(sys.argv[1]) else 1)

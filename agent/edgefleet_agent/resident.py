"""``python -m edgefleet_agent.resident STATE``: what ``fleet-agent run`` becomes. Sees to it that the process stays lean, hands on to :mod:`app`."""

from __future__ import annotations

from edgefleet_shared.deferred import defer, without


def main() -> None:
    """The program; its argument is the state folder."""
    # msgspec takes it where there is one, and typing where not. It brings inspect, ast and dis: 1.2 MB.
    without("typing_extensions")
    # urllib.parse, and with it pathlib, has it for addresses in brackets; subprocess for pipes of text: 0.9 MB.
    defer("ipaddress")
    defer("locale")
    from edgefleet_agent.app import main as run

    run()


if __name__ == "__main__":
    main()

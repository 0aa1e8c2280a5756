"""``python -m edgefleet_agent.resident STATE``: what ``fleet-agent run`` becomes. Sees to it that the process stays lean, hands on to :mod:`app`."""

from __future__ import annotations

from edgefleet_shared.deferred import defer, stand_in, without


def main() -> None:
    """The program; its argument is the state folder."""
    # msgspec takes it where there is one, and typing where not. It brings inspect, ast and dis: 1.2 MB.
    without("typing_extensions")
    # For addresses in brackets, pipes of text, tracebacks, websockets and JSON schemas; who uses them loads them then: 1.5 MB.
    for name in ("ipaddress", "locale", "tokenize", "textwrap", "traceback", "base64"):
        defer(name)
    # msgspec is imported here, with its part that waits. It knows decimal numbers, which no message holds: 0.4 MB.
    with stand_in("decimal", "Decimal"):
        defer("msgspec.inspect")
    from edgefleet_agent.app import main as run

    run()


if __name__ == "__main__":
    main()

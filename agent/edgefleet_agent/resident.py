"""``python -m edgefleet_agent.resident STATE``: what ``fleet-agent run`` becomes. Sees to it that the process stays lean, hands on to :mod:`app`."""

from __future__ import annotations

from edgefleet_shared.deferred import without


def main() -> None:
    # msgspec takes it where there is one, and typing where not. It brings inspect, ast and dis: 1.2 MB.
    without("typing_extensions")
    from edgefleet_agent.app import main as run

    run()


if __name__ == "__main__":
    main()

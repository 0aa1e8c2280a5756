"""``fleet``: the operator's command line."""

from __future__ import annotations

import click

from edgefleet_controller import __version__
from edgefleet_controller.cli import fleet
from edgefleet_controller.cli.agent import agent
from edgefleet_controller.cli.device import device
from edgefleet_controller.cli.device_class import device_class
from edgefleet_controller.cli.job import job
from edgefleet_controller.cli.model import model
from edgefleet_controller.cli.rollout import rollout
from edgefleet_controller.cli.toolchain import toolchain
from edgefleet_controller.cli.worker import worker


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleet")
def main() -> None:
    """edgefleet: compile a model per device class, sign it, roll it out in waves, prove it on every board.

    Begin with: fleet init, fleet serve, fleet apply, fleet model add, fleet model compile, fleet device token, fleet rollout create.
    """


for command in (
    fleet.init,
    fleet.serve,
    fleet.apply,
    fleet.renew,
    fleet.doctor,
    fleet.demo,
    device_class,
    model,
    device,
    rollout,
    agent,
    toolchain,
    worker,
    job,
):
    main.add_command(command)

if __name__ == "__main__":
    main()

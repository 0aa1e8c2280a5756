"""The worker process: receives Start over its channel, hands a confined process with a loaded model on to :mod:`serving`.

Forked by the :mod:`spawner`, one per model version. It checks the model's bytes, confines itself, loads, warms up, then answers until its channel ends. It never outlives
the front.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
from edgefleet_shared.artifact import Descriptor, Layout, ModelConfig
from edgefleet_shared.errors import EdgefleetError, EngineError, StarvedError

from edgefleet_agent import confinement
from edgefleet_agent.runtime import channel
from edgefleet_agent.runtime.channel import Ready, Start
from edgefleet_agent.runtime.engines import devices
from edgefleet_agent.runtime.shm import Arena


def main(link: socket.socket, arenas: tuple[int, int]) -> int:
    """Load, then serve until the channel ends.

    Args:
        link: the channel to the front.
        arenas: descriptors of the inputs' and the answers' memory, see :mod:`shm`; closed here.

    Returns:
        the process's exit status.
    """
    confinement.die_with_parent()
    start = channel.decode_to_worker(link.recv(channel.MAX_MESSAGE_BYTES))
    assert isinstance(start, Start)
    inputs = Arena(arenas[0], start.slot_count, start.input_bytes, writable=False)
    answers = Arena(arenas[1], start.slot_count, start.answer_bytes, writable=True)
    for fd in arenas:
        os.close(fd)  # before anything runs that could open the inputs' file for writing by its descriptor
    try:
        config = msgspec.json.decode(start.config, type=ModelConfig)
        layout = Layout(Path(start.layout))
        layout.check(Descriptor("", start.model_digest, start.model_size))
        policy = confinement.Policy(readable=(start.layout,), writable=devices.of(config.engine))
        missing = confinement.confine(policy)
        if confinement.is_refused_threads(start.threads):
            raise StarvedError(f"the board has no room for the threads of an inference, {start.threads}")
        # numpy and the engine are imported behind the confinement: their code runs with no more rights than the model's.
        from edgefleet_agent.runtime.serving import Serving

        serving = Serving(link, (inputs, answers), start, config, layout)
    except (EdgefleetError, MemoryError) as exc:
        problem = exc if isinstance(exc, EdgefleetError) else EngineError("out of memory while loading the model")
        if isinstance(problem, EngineError) and confinement.is_refused_memory(start.memory_bytes):
            problem = StarvedError(f"the board has no memory that the model may take: {problem.message}")
        link.send(channel.encode(channel.failed(problem)))
        return 1
    unconfined = (*missing, *serving.unconfined)
    link.send(channel.encode(Ready(serving.session.providers, serving.load_ms, serving.first_ms, unconfined)))
    serving.loop()
    return 0

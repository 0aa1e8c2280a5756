"""Stage 8, swap, the serving half: ``fleet-runtime``, the board's inference server, a process of its own.

::

    client --Open Inference Protocol--> http -> front -> switchboard -> worker (one process per model version)
    agent  --JSON lines, control.sock--> control_server -> orders -^

The front process owns every connection; each model version runs in a worker process behind shared memory, so a version can
start, crash or leave without any connection noticing.
"""

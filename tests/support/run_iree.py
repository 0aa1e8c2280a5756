"""Run in a userland for Arm: a module's answers to inputs. Arguments: the module, an .npy of inputs (first axis N), the .npy to write."""

from __future__ import annotations

import platform
import sys

import iree.runtime
import numpy as np


def main(module: str, inputs: str, outputs: str) -> None:
    config = iree.runtime.Config("local-sync")
    context = iree.runtime.SystemContext(config=config)
    with open(module, "rb") as stream:
        context.add_vm_module(iree.runtime.VmModule.copy_buffer(config.vm_instance, stream.read()))
    function = context.modules.module["net"]
    np.save(outputs, np.concatenate([np.array(function(one[None])) for one in np.load(inputs)]))
    print(platform.machine())


if __name__ == "__main__":
    main(*sys.argv[1:])

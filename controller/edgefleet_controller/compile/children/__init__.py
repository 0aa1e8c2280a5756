"""Stage 2, compile: what runs inside a toolchain's own environment, as a child process.

These modules import the toolchain's libraries and nothing of edgefleet but each other, because the environments share no
package with the controller. :mod:`.job` is the contract with the parent (:mod:`edgefleet_controller.compile.toolchains`).
"""

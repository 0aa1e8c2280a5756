"""edgefleet_shared: the contract between the controller and the boards.

Only msgspec and the standard library are imported at the top of these modules, because the resident agent lives on small
boards; whatever is heavier (python-tuf, cryptography) is imported where it is used.
"""

__version__ = "0.1.0"

"""edgefleet_controller: the controller, its compile workers and the operator's command line."""

__version__ = "0.1.0"

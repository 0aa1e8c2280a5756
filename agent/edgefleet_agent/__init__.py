"""edgefleet_agent: the agent and the inference runtime of a board."""

__version__ = "0.1.0"

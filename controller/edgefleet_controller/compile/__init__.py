"""Stage 2, compile: from a model version and a device class to a compiled model with its quality report (:mod:`.pipeline`)."""

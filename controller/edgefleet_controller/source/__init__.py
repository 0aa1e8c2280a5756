"""Stage 1, source: from a network, its manifest and pictures to an immutable model version (:mod:`.importing`)."""

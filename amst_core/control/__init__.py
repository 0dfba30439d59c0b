"""The control channel and the TCP listener that tells it from lanes."""

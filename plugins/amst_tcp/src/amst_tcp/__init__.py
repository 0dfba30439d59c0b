"""TCP transport for AMST. The core finds it by its entry point; ``transport.py`` holds the transport."""

"""BBR congestion control for AMST. The core finds it by its entry point; ``controller.py`` holds the algorithm."""

"""Congestion controllers in the simulator, against what was published of them: rows and series for the report."""

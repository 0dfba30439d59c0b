"""Files and trees below a root: nothing followed, nothing half-written under its final name."""

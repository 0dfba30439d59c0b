"""What `benchmarks/congestion/paths.py` measures: cells, transfers over them, and one module for each subcommand."""

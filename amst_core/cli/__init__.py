"""The command line: everything it can do goes through the public API; it alone configures logging and signals."""

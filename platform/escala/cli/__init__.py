"""The command line: a noun a file; render*.py are the only modules that print."""

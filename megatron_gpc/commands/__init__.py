"""One file for each command of the command line: `add_arguments(parser)` and `run(arguments)`.

A file's docstring is what `--help` says.  What is slow to import waits until the configuration has
been read, so that a mistake in it is told at once.
"""

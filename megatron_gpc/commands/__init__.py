"""One file for each subcommand of the command line."""

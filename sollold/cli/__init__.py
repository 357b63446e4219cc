"""The command line: each command calls a daemon's HTTP API, or starts a daemon."""

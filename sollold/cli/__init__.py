"""The commands: they call a daemon's HTTP API, or start one."""

"""Floor 6: the commands. Thin: they call a daemon over HTTP, or start one."""

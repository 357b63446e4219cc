"""The daemon: builds all parts, runs them as a process, and tells systemd."""

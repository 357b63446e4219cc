"""The daemon: assembles all parts of a node, runs them as a process, and reports to systemd."""

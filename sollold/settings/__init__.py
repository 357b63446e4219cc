"""The settings: their definition, reading and writing them, and the daemon's folders."""

"""Floor 4: HTTP, one file a dialect."""

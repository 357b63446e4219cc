"""Floor 3: a request finds its endpoint, waits its turn, and gets its bytes back whatever dies."""

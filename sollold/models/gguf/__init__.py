"""GGUF files: reads headers, writes small files, knows tensor types; includes the demo model."""

"""GGUF files: reads headers, writes small files, tells tensor types; the demo model."""

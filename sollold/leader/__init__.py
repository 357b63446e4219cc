"""Floor 3: what should run where. Decisions are pure; the shell carries them to the owners."""

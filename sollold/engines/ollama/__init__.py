"""The Ollama on this machine: its API, models and memory, and its process if we manage it."""

"""The Ollama of this machine: its API, its models and memory, its process if we manage it."""

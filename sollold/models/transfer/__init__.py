"""Downloads from other nodes, Hugging Face and Ollama: resumable, verified, rate-limited."""

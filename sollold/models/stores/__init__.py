"""Where models are found: Ollama's store, Hugging Face's cache, folders; the catalogue of all."""

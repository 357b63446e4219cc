"""The stores that models are found in: Ollama's, Hugging Face's cache, folders; and the catalogue of all."""

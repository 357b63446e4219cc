"""Downloads: from other nodes, Hugging Face and Ollama; resumable, verified, with limited rate."""

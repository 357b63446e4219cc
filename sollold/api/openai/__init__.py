"""OpenAI's dialect, ``/v1/*``: chat, completions, responses, embeddings, and llama-server's own routes."""

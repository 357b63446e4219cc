"""Ollama's dialect, ``/api/*``: requests to engine calls, and answers back."""

"""Ollama's dialect, ``/api/*``: converts requests to engine calls, and answers back."""

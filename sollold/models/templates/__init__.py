"""Ollama's prompt templates (Go's ``text/template``): read, and translated to llama-server's Jinja. Pure."""

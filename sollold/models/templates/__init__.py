"""Ollama's prompt templates (Go's ``text/template``): parsing, rendering, and translation to Jinja. Pure."""

"""A test double of an Ollama server with the documented behaviour of its HTTP API."""

from tests.ollama_standin.server import Known, Standin

__all__ = ["Known", "Standin"]

"""A stand-in for an Ollama server, for tests: it keeps to the documented behaviour of its HTTP API."""

from tests.ollama_standin.server import Known, Standin

__all__ = ["Known", "Standin"]

"""Processes and protocols of the engines that compute: llama.cpp, Ollama, external workers."""

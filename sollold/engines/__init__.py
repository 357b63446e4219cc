"""Engine processes and protocols: llama.cpp, Ollama, external RPC workers."""

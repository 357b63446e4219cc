"""llama.cpp deployments: llama-server, RPC workers, the tunnels between them, and cleaning up after them."""

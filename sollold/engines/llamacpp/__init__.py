"""Deployments by llama.cpp: llama-server, RPC workers, the tunnel between them, what they leave behind."""

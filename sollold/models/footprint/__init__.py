"""Computes the bytes that each layer of a model needs, from its header and run options. Pure."""

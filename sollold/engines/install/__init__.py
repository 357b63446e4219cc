"""Finds llama.cpp on this machine, or builds the pinned version."""

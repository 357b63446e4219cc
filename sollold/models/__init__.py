"""Model files and their names. Only headers are read, never tensors; the user's files are never written."""

"""Model files and their names. Headers are read, tensors never; the user's files are never written."""

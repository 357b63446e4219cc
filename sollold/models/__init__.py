"""Floor 1: model files. Headers are read, tensors never; the user's files are never written."""

"""Shared by all dialects: engine calls, messages, chunks, fields, truncation, tokenizing, embeddings."""

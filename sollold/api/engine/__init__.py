"""What all dialects share: engine calls, messages, chunks, fields, truncation, tokenizing, embeddings."""

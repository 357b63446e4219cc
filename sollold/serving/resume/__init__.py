"""Continues a stream on another engine after a fault; one module per event format."""

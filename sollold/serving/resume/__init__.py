"""Continuing a stream on another engine after a fault, one module a form of events."""

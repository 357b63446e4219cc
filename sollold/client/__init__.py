"""Stands apart: a client of the HTTP API for Python programs and for the command line."""

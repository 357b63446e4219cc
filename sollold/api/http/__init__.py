"""The HTTP application: routing, bodies, callers, errors, CORS, responses."""

"""Serves requests. At the node that received one, `service` and `executor` choose an endpoint (`router`,
`dispatch`) or have one loaded (`loader`), send it the request (`attempts`) and recover from faults
(`recovery`, `resume`). At the endpoint's node, `endpoint_server` holds the queue (`admission`), the
engine's streams and the watchdog.
"""

"""Answering requests: `service` and `executor` at the node that was asked choose an endpoint (`router`,
`dispatch`), have one loaded (`loader`), ask it (`attempts`) and recover from faults (`recovery`, `resume`);
`endpoint_server` at the endpoint's node has the queue (`admission`), the streams from the engine and the
watchdog.
"""

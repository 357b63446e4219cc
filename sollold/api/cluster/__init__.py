"""The cluster's own endpoints: state, placement, batches, metrics, the OpenAPI description."""

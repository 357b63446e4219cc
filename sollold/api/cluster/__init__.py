"""Routes of the cluster itself: state, placement, batches, metrics, the OpenAPI description."""

"""Floor 5, beside `sollold.daemon`: small adapters, where a room asks for a Protocol and two others answer it."""

"""Floor 5, beside `sollold.daemon`: adapters, where one room asks for a Protocol and two others answer it."""

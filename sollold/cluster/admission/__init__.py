"""How a machine joins a cluster that has its own secret: by founding one or by being admitted."""

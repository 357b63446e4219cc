"""How a machine becomes a member of a cluster with a secret of its own: by founding one or being admitted."""

"""How a machine becomes a member of a cluster that has a secret of its own: founding one, or being let in."""

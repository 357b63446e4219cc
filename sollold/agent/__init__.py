"""This node's share of what the cluster runs: memory ledger, grants, downloads ordered by the leader."""

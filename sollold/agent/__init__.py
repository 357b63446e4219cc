"""This node's share of what the cluster runs: memory ledger, grants, fetching of files."""

"""Nodes, their records, the leader, and the connections between nodes."""

"""Nodes, their records, the leader, and the connections between nodes.

Each protocol has words of its own for its messages, so two may have one name (`Ping` of gossip and of the
standing links, `Hello` of those and of admission): only the two ends of a protocol import its messages.
"""

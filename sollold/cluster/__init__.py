"""Nodes, their records, the leader, and the connections between nodes.

Each protocol defines its own messages, so two may have the same name (`Ping` of gossip and of the standing
links, `Hello` of those and of admission): only the two ends of a protocol import its messages.
"""

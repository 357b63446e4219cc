"""The gossip protocol without I/O: membership (SWIM), records, election. Packets in, actions out."""

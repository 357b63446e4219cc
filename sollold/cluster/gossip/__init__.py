"""The gossip protocol without I/O: membership (SWIM), records, elections. Packets in, actions out."""

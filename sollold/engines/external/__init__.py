"""RPC workers that others started: their protocol, checks of them, the scan of the LAN for them."""

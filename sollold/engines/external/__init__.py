"""External RPC workers, not started by sollold: their protocol, probes, and a LAN scan for them."""

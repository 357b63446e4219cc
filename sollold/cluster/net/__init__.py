"""I/O of the cluster: datagrams, TLS, calls, links, tunnels, mDNS; identity and state files."""

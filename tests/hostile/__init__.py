"""Tests against malicious clients, strangers on the network, and lying members of the cluster."""

"""The cluster as the dialects ask for it: the view, the leader's preview, loads, drains and the router."""

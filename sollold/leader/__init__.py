"""What should run where. Decisions are pure; `leader` and `apply` carry them to the nodes that
own the memory, and `client` is how any node asks whoever leads.
"""

"""Decides what should run where. Decisions are pure; `leader` and `apply` carry them to the nodes that own
the memory, and any node asks the current leader through `client`.
"""

"""sollold lets the machines of a LAN run large language models together.

The house, floor by floor; imports point down only:

====  ==================  ====================================================================
6     ``cli``             commands; they call a daemon's HTTP API, or start one
5     ``daemon``          builds the parts, starts and stops them in order;  ``serve``: the process
4     ``api``             HTTP: one file a dialect, metrics, the dashboard
3     ``serving``         request → endpoint, whose turn it is, the bytes back, going on
3     ``leader``          what should run where
2     ``agent``           this machine's share: ledger, child processes, tunnel, llama.cpp
2     ``placement``       pure: footprint + devices + policy → plan, with its reasons
1     ``models``          GGUF header, footprint, stores, catalogue
1     ``cluster``         discovery, membership, records, election, identity, peer calls
0     ``machine``         devices, memory, speed;  ``config``: settings
====  ==================  ====================================================================

``client`` stands apart and talks HTTP only.
"""

__version__ = "0.1.0"

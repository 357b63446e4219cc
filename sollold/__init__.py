"""sollold lets the machines of a LAN run large language models together.

The packages, layer by layer; imports point down only (checked by `make check`):

=====  ==============================  =============================================================
``9``  ``cli``                         one file per command; they call a daemon's HTTP API, or start a daemon
``8``  ``daemon``                      assembles the parts of a node; the process; systemd
``7``  ``api``                         HTTP: one package per dialect, and what the dialects share
``6``  ``control``                     cluster-wide operations behind the commands
``5``  ``serving``                     requests: endpoint, queue, stream, resuming after a failure
``4``  ``leader``                      decides what runs where; client for calling the current leader
``3``  ``agent``, ``engines``          this node's share of the work; engine processes and protocols
``2``  ``placement``                   pure: footprint + devices + policy → plan, with its reasons
``1``  ``models``, ``cluster``         model files; membership, records, election, identity
``0``  ``machine``, ``settings``       devices and memory; settings; below them the modules used everywhere:
                                       ``errors``, ``facts``, ``log``, ``retry``, ``subscribers`` …
=====  ==============================  =============================================================

``client`` stands apart and talks HTTP only.
"""

__version__ = "0.1.0"

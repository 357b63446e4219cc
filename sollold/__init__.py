"""sollold lets the machines of a LAN run large language models together.

The rooms, floor by floor; imports point down only (checked by `make check`):

=====  ==============================  =============================================================
``9``  ``cli``                         one file a command; they call a daemon's HTTP API, or start one
``8``  ``daemon``                      builds the parts of a node; the process; systemd
``7``  ``api``                         HTTP: a package a dialect, and what the dialects share
``6``  ``control``                     what commands do over the whole cluster
``5``  ``serving``                     a request: endpoint, queue, stream, resuming after a failure
``4``  ``leader``                      what should run where; how to ask whoever leads
``3``  ``agent``, ``engines``          this node's share; processes and protocols of the engines
``2``  ``placement``                   pure: footprint + devices + policy → plan, with its reasons
``1``  ``models``, ``cluster``         model files; membership, records, election, identity
``0``  ``machine``, ``settings``       devices and memory; settings; below them single files that all use:
                                       ``errors``, ``facts``, ``log``, ``retry``, ``subscribers`` …
=====  ==============================  =============================================================

``client`` stands apart and talks HTTP only.
"""

__version__ = "0.1.0"

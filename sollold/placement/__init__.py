"""Pure: footprint + devices + policy → plan, with its reasons. No I/O, no clock."""

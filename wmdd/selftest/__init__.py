"""``wmdd selftest``: does this machine compute what it should?  Rows that pass, fail or are not available."""

"""`vprune bench`: how long things take, on which machine, against what."""

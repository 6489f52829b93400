"""Every operation against the plainest way to compute it."""

"""What `vprune report` is made of: runs gathered into sections, tables, curves, a gallery and the page."""

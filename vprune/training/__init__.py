"""Training recipes: what made the embedded models in `assets/models`."""

from __future__ import annotations

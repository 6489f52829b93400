"""The only folder that knows how model families name their parts, and how the library beneath lays out caches and masks."""

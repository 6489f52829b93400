"""The only folder that knows how families name their parts and how transformers lays out caches and masks."""

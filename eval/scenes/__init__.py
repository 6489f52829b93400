"""Scenes: a procedural world of questions about images, with exact masks, boxes, captions and evidence.

`world` holds the nouns, `layout` draws a scene from a seed, `render` paints a batch of scenes with torch, `questions`
asks about them and `split` writes a benchmark folder.
"""

from __future__ import annotations

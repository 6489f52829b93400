"""Segmentation in twelve lines: `python assets/demo_segment.py photo.jpg "the red circle"`; no phrase: everything."""

import sys

import vprune

image = sys.argv[1] if len(sys.argv) > 1 else "assets/scenes/images/000003.webp"
phrase = sys.argv[2] if len(sys.argv) > 2 else None
masks = vprune.segment(image, model="embedded", segmenter="embedded", phrase=phrase)
for name, score, box in zip(masks.names, masks.scores, masks.boxes, strict=True):
    print(f"{name}: {score:.2f} at {box.round().astype(int).tolist()}")
masks.save_png("masks.png")
print(f"{len(masks)} masks written to masks.png; COCO: {len(masks.to_coco())} annotations")

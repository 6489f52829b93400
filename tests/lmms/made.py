"""Questions of the shipped scenes in POPE's format, as a benchmark of vprune and as a task of lmms-eval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vprune.eval.benchmarks.scenes import shipped

TASK = "pope_scenes"
_YAML = f"""\
dataset_path: json
dataset_kwargs:
  data_files:
    test: QUESTIONS
task: {TASK}
test_split: test
output_type: generate_until
doc_to_visual: !function reading.pictures
doc_to_text: !function reading.question
doc_to_target: label
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
  image_aspect_ratio: original
process_results: !function reading.score
metric_list:
  - metric: pope_accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""
_READING = """\
from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).parent / "images"


def pictures(doc):
    return [Image.open(IMAGES / doc["image"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]


def score(doc, results):
    return {"pope_accuracy": float(results[0].strip().lower().rstrip(".") == doc["label"])}
"""


def write_pope(folder: Path, count: int) -> Path:
    """`coco_pope_random.json`, its images, and beside them the task that lmms-eval's include_path finds."""
    scenes = shipped()
    lines = (json.loads(line) for line in (scenes / "samples.jsonl").read_text().splitlines())
    chosen = [line for line in lines if line["answer"] in ("yes", "no")][:count]
    rows = []
    (folder / "images").mkdir(parents=True)
    for number, line in enumerate(chosen, start=1):
        image = Path(line["image"]).name
        shutil.copy(scenes / line["image"], folder / "images" / image)
        rows.append({"question_id": number, "image": image, "text": line["question"], "label": line["answer"]})
    questions = folder / "coco_pope_random.json"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{TASK}.yaml").write_text(_YAML.replace("QUESTIONS", str(questions)))
    (folder / "reading.py").write_text(_READING)
    return folder

"""The model `vprune` of lmms-eval, its plugin.

    pip install 'vprune[lmms]'
    lmms-eval --model vprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=learned,keep=0.1 --tasks pope

lmms-eval reads `manifest` from the entry point at every start, whichever model it is asked for: nothing heavy here.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told: the model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vprune", chat_class_path="vprune.lmms.chat.VPrune")

from __future__ import annotations

from tests.eval.conftest import model_folder, one_thread

__all__ = ["model_folder", "one_thread"]

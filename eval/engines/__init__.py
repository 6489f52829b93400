"""Engines: where a run's questions are answered; `conf/engine/NAME.yaml` names a class of these."""

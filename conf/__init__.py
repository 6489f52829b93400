"""The YAML files, a config group per folder; a package so that Hydra finds `pkg://vprune.conf`."""

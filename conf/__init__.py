"""The YAML files: config groups model, method, benchmark, engine (a package so that Hydra finds `pkg://vprune.conf`)."""

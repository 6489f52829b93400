"""Methods by name: the YAML files that describe them, read without importing torch."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from vprune.errors import VPruneError

METHOD_FILE = ".yaml"


@lru_cache(maxsize=1)
def method_names() -> list[str]:
    """The names of all methods: the YAML files in conf/method/."""
    folder = resources.files("vprune.conf") / "method"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def method_label(name: str) -> str:
    """What reports call a method: its name, or that of its file without the ending."""
    return Path(name).stem if str(name).endswith(METHOD_FILE) else name


def read_method(name: str) -> dict[str, Any]:
    """The configuration of a method: that of conf/method/NAME.yaml, or of the YAML file at the path `name`.

    Raises:
        VPruneError: there is no such method, or the file is none of a method.
    """
    from omegaconf import OmegaConf

    if isinstance(name, str) and name.endswith(METHOD_FILE):
        return _read_file(Path(name).expanduser())
    if not isinstance(name, str) or name not in method_names():
        known = ", ".join(method_names())
        raise VPruneError(
            f"method={name!r} is unknown: choose one of {known}, or give the path of a {METHOD_FILE} file"
        )
    text = (resources.files("vprune.conf") / "method" / f"{name}.yaml").read_text(encoding="utf-8")
    config: Any = OmegaConf.to_container(OmegaConf.create(text))
    return dict(config)


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise VPruneError(f"method={path}: the file cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise VPruneError(f"method={path} is not YAML: {' '.join(str(error).split())}") from error
    target = config.get("_target_") if isinstance(config, dict) else None
    if not isinstance(target, str) or not target.startswith("vprune."):
        raise VPruneError(
            f"method={path} describes no method: its _target_ is {target!r}, and should be a class of vprune's, such "
            "as vprune.pruner.Pruner; conf/method/ has examples"
        )
    if "name" not in config and path.stem == "full":
        raise VPruneError(f"method={path}: full is the model without pruning (method=full); call the file otherwise")
    known = [method for method in method_names() if method != "full"]
    if "name" in config and config["name"] not in known:
        raise VPruneError(
            f"method={path}: name: {config['name']} is no method that it could be a variation of: choose one of "
            f"{', '.join(known)}, or leave it out, and reports call the method by its file, {path.stem}"
        )
    return dict(config)

"""Loading a vision-language model and its processor for a run."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vprune.errors import VPruneError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
EMBEDDED = "embedded"
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
_WHOLE_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ModelChoice:
    """Which model to load and how: `path` is "embedded", a folder or a hub id; `dtype` and `device` may be "auto"."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with the processor that goes with it."""

    model: Any
    processor: Any
    device: torch.device
    dtype: str
    revision: str | None


def load(choice: ModelChoice) -> LoadedModel:
    """Load model and processor.

    `device=auto` is the first CUDA device, else the CPU; `dtype=auto` is float32 on the CPU and for the embedded model,
    else bfloat16. Raises VPruneError if the model cannot be found or loaded, with the library's reason.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    device = pick_device(choice.device)
    dtype = pick_dtype(choice, device)
    source = resolve(choice.path)
    common: dict[str, Any] = {"revision": choice.revision} if choice.revision else {}
    common["trust_remote_code"] = choice.trust_remote_code
    at_hand = Path(source).is_dir() or _on_hub(source, choice.revision)
    common["local_files_only"] = not at_hand
    try:
        processor = AutoProcessor.from_pretrained(source, **common)  # type: ignore[no-untyped-call]
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, dtype), attn_implementation=choice.attention, **common
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        raise VPruneError(_unloadable(choice, error) if at_hand else _unreachable(choice, error)) from error
    _check(choice, processor)
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    model = model.to(device).eval()
    return LoadedModel(model, processor, device, dtype, getattr(model.config, "_commit_hash", None))


def resolve(path: str) -> str:
    """The folder or hub id behind `path`: "embedded" is the model inside the package."""
    if path == EMBEDDED:
        folder = Path(str(files("vprune") / "assets" / "models" / "vlm"))
        if not (folder / "config.json").is_file():
            raise VPruneError(
                f"the embedded model is missing from this installation ({folder}); name another with model="
            )
        return str(folder)
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise VPruneError(f"model={path}: the folder holds no config.json, so it is no saved model")
        return str(local.resolve())
    if not re.fullmatch(HUB_ID, path):
        raise VPruneError(f"model={path} is neither a folder here nor a hub id of the form owner/name")
    return path


def fingerprint(path: str) -> str | None:
    """Hash of a local model's files, so that a run notices when the weights have changed; None for a hub id."""
    folder = Path(resolve(path))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as handle:
            if size > _WHOLE_FILE_BYTES:  # reading 14 GB of weights to name them would take longer than many a run
                digest.update(handle.read(2**20))
                handle.seek(-(2**20), 2)
            digest.update(handle.read())
    return digest.hexdigest()[:16]


def pick_device(name: str) -> torch.device:
    """The device meant by "auto", "cpu", "cuda" or "cuda:N"; VPruneError if this machine has no such device."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            index, count = device.index or 0, torch.cuda.device_count()
            if index >= count:
                raise VPruneError(f"device={name}: torch sees {count} CUDA devices here; use device=cpu or device=auto")
        elif device.type != "cpu":
            torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise VPruneError(f"device={name} is not usable here; use auto, cpu, cuda or cuda:N") from error
    return device


def pick_dtype(choice: ModelChoice, device: torch.device) -> str:
    """The name of the dtype meant by `choice.dtype` on `device`."""
    if choice.dtype != "auto":
        return choice.dtype
    return "float32" if device.type == "cpu" or choice.path == EMBEDDED else "bfloat16"


def image_token_id(model: Any) -> int:
    """The id that stands for one visual token in the prompt; VPruneError if the model states none."""
    for key in ("image_token_id", "image_token_index"):
        value = getattr(model.config, key, None)
        if value is not None:
            return int(value)
    raise VPruneError(f"{type(model).__name__} states no image_token_id, so its visual tokens cannot be counted")


def visual_token_ids(model: Any) -> list[int]:
    """The ids that stand for visual tokens in the prompt: an image's, and a video's where the model has one."""
    video = [getattr(model.config, key, None) for key in ("video_token_id", "video_token_index")]
    return [image_token_id(model), *(int(value) for value in video if value is not None)]


def _check(choice: ModelChoice, processor: Any) -> None:
    if getattr(processor, "tokenizer", None) is None or getattr(processor, "image_processor", None) is None:
        raise VPruneError(
            f"model={choice.path} has no processor for images and text together; is it a vision-language model?"
        )
    if (
        getattr(processor, "chat_template", None) is None
        and getattr(processor.tokenizer, "chat_template", None) is None
    ):
        raise VPruneError(
            f"model={choice.path} has no chat template; use an instruction-tuned model, or save one with it"
        )


def _unloadable(choice: ModelChoice, error: Exception) -> str:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    message = f"model={choice.path} cannot be loaded: {reason}"
    if "trust_remote_code" in text:
        return f"{message} If you trust its code, add model.trust_remote_code=true."
    if choice.attention in text or "attn_implementation" in text:
        return f"{message} Try engine.attention=eager."
    return message


def _unreachable(choice: ModelChoice, error: Exception) -> str:
    """Why a hub's model cannot be had where the hub does not answer: a wrong id and a lost network look alike there."""
    from huggingface_hub import constants

    name, cache = choice.path, Path(constants.HF_HUB_CACHE)
    cached = [one.name.removeprefix("models--").replace("--", "/", 1) for one in cache.glob("models--*--*")]
    silent = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "no network?"
    if name in cached:
        return f"{_unloadable(choice, error)} (The hub does not answer, {silent}; its copy in {cache} was tried.)"
    near = [f" (did you mean {one}, which is cached?)" for one in get_close_matches(name, cached, n=1)]
    return (
        f"model={name} is not in the cache ({cache}), and the hub does not answer ({silent}): either the id is wrong "
        f"or the network is missing. Check how it is spelt{''.join(near)}, connect, or give a folder that holds the "
        "model: model=FOLDER"
    )


def _on_hub(name: str, revision: str | None) -> bool:
    """Whether the hub has the model; False if it cannot be asked: a cached copy then serves without retries.

    Raises VPruneError if the hub knows no such model or revision, or wants a login for it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except RevisionNotFoundError as error:
        raise VPruneError(f"model={name} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise VPruneError(f"model={name} is not on the hub, or needs a login (hf auth login)") from error
    except Exception:  # noqa: BLE001 - no network, in the words of whichever HTTP library the hub's client uses
        return False
    return True

"""`prune(model, ...)`: hooks on, hooks off, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vprune.errors import VPruneError
from vprune.models.anatomy import Anatomy, carries_images, dissect, refuse_compiled
from vprune.models.aside import aside, moment_of
from vprune.models.cache import (
    cache_in,
    fixed_size,
    is_static,
    logical,
    of_one_kind,
    stored_length,
    widened,
    without_cache,
)
from vprune.models.foreseen import refuse_layers
from vprune.models.masks import layer_mask, prefill_mask, refuse_bias, refuse_windows, stored_mask
from vprune.models.prefill import (
    Glance,
    callers_mask,
    masks_of_model,
    needs_none,
    read_prefill,
    restored,
    shortened_deepstack,
    with_cache,
)
from vprune.models.probe import note_if_plain
from vprune.models.tower import TowerWatch
from vprune.passage import Passage, cache_layer_masks
from vprune.pruner import Pruner, Resize, load_method
from vprune.records import PruneReport
from vprune.replays import Begun, Reads, Replays, replayable
from vprune.scoring.vflow import VisualFlow

_PRUNED: WeakSet[nn.Module] = WeakSet()  # models with hooks on, so that nesting can be refused


def prune(
    model: Any,
    method: str | Pruner = "learned",
    keep: float | int | None = None,
    *,
    graphs: bool = False,
    **options: Any,
) -> Pruning:
    """Prune the visual tokens of a Hugging Face vision-language model while it generates.

    Args:
        model: a vision-language model instance, as AutoModelForImageTextToText loads it.
        method: a name in conf/method/ (`vprune.method_names()`), or a `Pruner`.
        keep: what stays of every image: a fraction in (0, 1], or a number of tokens (int >= 1); None = the method's
            default, 0.1.
        graphs: on a GPU, record what is decided before the first layer as a CUDA graph for each layout of prompts that
            is met again (the same places of text and images), and replay it: the host then no longer holds up a short
            prefill. While they are in use the weights may change, but not what the first layers do: no adapters
            switched, no hooks added. Other layouts, and all on a CPU, go on as ever.
        options: the method's own: layer, stages, recycle ("none", "grid"), cells, size_aware, budget, minimum, seed ...
            (see `vprune.pruner.Pruner`). None = its default.

    Returns:
        A context manager; also `.attach()` and `.detach()`. `.last` is the `PruneReport` of the last prompt with
        images, None until there was one, and always with method="full", which hooks nothing.

    Raises:
        VPruneError: unknown method or option, keep out of range, a layer that the decoder does not have, not a
            vision-language model; graphs with a method in whose decisions the host has a say.

    Example:
        >>> with vprune.prune(model, method="attention", keep=0.1) as pruning:
        ...     out = model.generate(**processor(images=image, text=prompt, return_tensors="pt"), max_new_tokens=32)
        >>> pruning.last.tokens_after == max(1, pruning.last.tokens_before // 10)
        True
    """
    if isinstance(method, Pruner):
        if options:
            raise VPruneError(f"options {', '.join(options)} were given with a Pruner object: set them on the object")
        pruner = method if keep is None else method.with_keep(keep)
    else:
        pruner = load_method(method, keep=keep, **options)
    return Pruning(model, pruner, graphs=graphs)


class Pruning:
    """Pruning of one model instance; see `prune`.

    `evidence`: a list of bool masks [H, W] (or None), one per image of the batch in order, consumed by the next
        prefill; only methods with `needs_evidence` read it. `last`: the report of the last prompt with images, None
        until there was one, and always with method=full, which hooks nothing: ask `if pruning.last is not None` where
        the method may be that one.

    Raises:
        VPruneError: `model` is no vision-language model, or does not have the layer that the method was told.
    """

    def __init__(self, model: Any, pruner: Pruner, graphs: bool = False) -> None:
        self.evidence: Sequence[Any] | None = None
        self.last: PruneReport | None = None
        refuse_compiled(model)
        self._anatomy: Anatomy = dissect(model)
        self._model = model
        refuse_layers([pruner.layer, getattr(pruner.scorer, "layer", None)], len(self._anatomy.layers))
        self.pruner = pruner = pruner.fitted(len(self._anatomy.layers)).bound(self._anatomy)
        scorer = pruner.scorer
        looked_at = {0, *(layer for layer, _ in pruner.schedule), getattr(scorer, "layer", None) or 0}
        for layer in looked_at & set(range(len(self._anatomy.layers))):
            note_if_plain(self._anatomy.decoder, getattr(self._anatomy.layers[layer], "self_attn", None), layer)
        if graphs and not replayable(pruner):
            raise VPruneError(
                f"graphs=True: the plans of method={pruner.name or type(pruner).__name__} cannot be replayed, since "
                "the host has a say in them (stages, budgets over several images, or what the tower saw); "
                "leave graphs out, or choose attention, attention_max or learned before layer 0"
            )
        self._replays = Replays() if graphs else None
        self._tower = TowerWatch(
            self._anatomy,
            fingerprints=pruner.selector.fingerprints,
            attention_layer=None if scorer is None else scorer.tower_layer,
            attention=scorer.attention if isinstance(scorer, VisualFlow) else None,
            entropy=scorer.entropy if isinstance(scorer, VisualFlow) and scorer.looks_at_pixels else None,
            keys=getattr(pruner, "reads_keys", False),
            small_grid=pruner.small_grid if isinstance(pruner, Resize) else None,
        )
        self._attached = False
        self._handles: list[RemovableHandle] = []
        self._glance: Glance | None = None  # at this forward's prompt, if there are visual tokens in it
        self._mask: Tensor | None = None  # the caller's 2-D mask, where the model hands finished ones to its decoder
        self._passage: Passage | None = None  # the prefill that the decoder is running
        self._later: Callable[[], Passage] | None = None  # tells it, where that can wait
        self._whole: tuple[dict[str, Any], Any] | None = None  # one that stays as it is, to be told of afterwards
        self._carried = False  # whether this forward brought images
        self._layers_watched = False
        self._layer_masks: dict[Any, Any] = {}  # of this forward, for layers that store other rows than the first

    def __enter__(self) -> Pruning:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def attach(self) -> Pruning:
        """Put the hooks on.

        Raises:
            VPruneError: the model is being pruned already.
        """
        base, decoder = self._anatomy.base, self._anatomy.decoder
        if base in _PRUNED:
            raise VPruneError(
                "this model is being pruned already: leave the other `with vprune.prune(...)` block first (or detach())"
            )
        for layer, _ in self.pruner.schedule:
            if layer >= len(self._anatomy.layers):
                raise VPruneError(f"stages: layer {layer}: the decoder has layers 0 to {len(self._anatomy.layers) - 1}")
        if self.pruner.hooked:
            if self.pruner.size_aware:
                refuse_bias(self._anatomy.backend)
            if self._anatomy.has_windows:
                refuse_windows(self._anatomy.backend)
            try:
                self._handles = self._tower.attach()
                if self._anatomy.tower is not None:
                    self._handles.append(self._anatomy.tower.register_forward_hook(self._after_tower))
                self._handles += [
                    base.register_forward_pre_hook(self._before_base, with_kwargs=True),
                    base.register_forward_hook(self._after_base, always_call=True),
                    decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
                    decoder.register_forward_hook(self._after_decoder),
                ]
                if "flash" in self._anatomy.backend:
                    self._watch_layers()
            except VPruneError:
                self._remove_hooks()
                raise
        _PRUNED.add(base)
        self._attached = True
        return self

    def detach(self) -> None:
        """Take the hooks off; the model is as it was. Detaching twice does nothing."""
        if self._attached:
            _PRUNED.discard(self._anatomy.base)
            self._attached = False
            # A static cache that `generate` keeps for its next call: on the model, or on what an adapter holds.
            for part in self._model.modules():
                if logical(vars(part).get("_cache")) is not None:
                    del part._cache
        self._remove_hooks()
        if self._replays is not None:
            self._replays.forget()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers_watched = [], False
        self._forget()
        self._tower.forget()

    def _forget(self) -> None:
        self._glance = self._mask = self._passage = self._later = self._whole = None
        self._layer_masks = {}

    def _watch_layers(self) -> None:
        """Hook the decoder's layers too: only where a prompt, a cache or an attention backend calls for it."""
        if not self._layers_watched:
            self._handles += [
                layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True)
                for number, layer in enumerate(self._anatomy.layers)
            ]
            self._layers_watched = True

    def _before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forget()
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if not carries_images(kwargs):
            return
        if kwargs.get("mm_encoder_outputs") is None:
            self._tower.forget()  # the tower runs inside this forward; what it saw before belongs to no one
        self._tower.keep_for_later()
        self._carried = True
        input_ids = args[0] if args else kwargs.get("input_ids")
        self._glance = Glance.at(self._anatomy, kwargs, input_ids)
        self._mask = self._glance.mask

    def _after_tower(self, tower: nn.Module, args: Any, output: Any) -> None:
        if self._glance is not None and self._glance.sees_any:
            # Found out and made while the device is at work on the tower.
            _ = self._glance.facts, self._glance.breaks, self._glance.cache
            if self._replays is not None:
                self._replays.foresee(self._anatomy, self.pruner, self._glance)

    def _after_base(self, base: nn.Module, args: Any, output: Any) -> None:
        if self._carried:
            self._tower.forget()
        self._carried = False
        self._forget()

    def _before_decoder(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if kwargs.get("inputs_embeds") is None:
            return None
        if self._glance is not None and not self._glance.sees_any:
            self._glance = None  # no placeholder has come with the images: the model will say so, if it minds
        if self._glance is not None:
            if self._stays_whole(kwargs):
                self._whole = kwargs, moment_of(kwargs["inputs_embeds"])
                return None
            kwargs = self._begin(with_cache(self._anatomy, kwargs, self._glance), self._glance)
        cache = cache_in(kwargs)
        if logical(cache) is None:
            return args, kwargs
        if self._anatomy.has_windows or not of_one_kind(cache):
            self._watch_layers()
        passage = self._settled()
        if passage is None or not passage.shortened:
            # Earlier turns were pruned: the caller's mask is over tokens seen, not over rows stored.
            inputs, own = kwargs["inputs_embeds"], callers_mask(kwargs, self._mask)
            kwargs = {**kwargs, "attention_mask": stored_mask(cache, own, inputs, self._anatomy.backend)}
        return args, kwargs

    def _stays_whole(self, kwargs: dict[str, Any]) -> bool:
        """True when nothing can be pruned and nothing was: the decoder runs at once, and the report comes after."""
        cache = cache_in(kwargs)
        fresh = cache is None or not (is_static(cache) or stored_length(cache) or logical(cache))
        return fresh and self.pruner.keeps_all and not hasattr(self._model, "hf_device_map")

    def _tell(self, kwargs: dict[str, Any], moment: Any, glance: Glance) -> None:
        """The report of a prefill that stayed as it was; read beside the decoder's work, which may be under way."""
        alone = without_cache(kwargs)
        with aside(kwargs["inputs_embeds"].device, moment):
            read = {**alone, "attention_mask": callers_mask(alone, self._mask, glance.seen)}
            prefill = read_prefill(self._anatomy, read, glance, self._tower.images, self.evidence)
            self.evidence = None
            passage = Passage(self.pruner, prefill, None)
            _, short = passage.enter(0, prefill.hidden)
            assert short is None, "a method that keeps everything pruned something"
            self.last = passage.report()

    def _begin(self, kwargs: dict[str, Any], glance: Glance) -> dict[str, Any]:
        """Start the passage of this prefill; if it is shortened before layer 0, exchange the decoder's inputs."""
        fits = fixed_size(cache_in(kwargs))
        own_masks = None if glance.plain else masks_of_model(kwargs, self._mask)
        read = {**kwargs, "attention_mask": callers_mask(kwargs, self._mask, glance.seen)}
        images, evidence, self.evidence = self._tower.images, self.evidence, None

        def described() -> Passage:
            return Passage(self.pruner, read_prefill(self._anatomy, read, glance, images, evidence), own_masks)

        if self._replays is None:
            begun = Begun.planned(described())
        else:
            begun = self._replays.begun(
                described, Reads(self._anatomy, self.pruner, read, glance, list(images), own_masks)
            )
        self._later, short, embeds = begun.passage, begun.short, begun.embeds
        every_layer = own_masks is not None or self._anatomy.has_windows  # no single mask serves all
        passage = None if begun.late else self._settled()
        if (passage is not None and not passage.ends_at_once) or (short is not None and every_layer):
            self._watch_layers()
        if short is None:
            return kwargs
        cache = cache_in(kwargs)
        layer = logical(cache)
        valid = short.valid if short.padded else None
        rows = begun.past.continued(begun.stored, valid, short.bias, short.index.shape, 0)
        plain = cache is not None and not glance.seen and rows.valid is None and rows.bias is None
        masked: Any
        if every_layer:
            masked = kwargs["attention_mask"]  # each layer gets its own instead
        elif plain and fits is None:
            masked = None  # whoever gets a mask reads it on the host, and waits there until all is planned
        elif plain and needs_none(kwargs.get("attention_mask")):
            masked = kwargs["attention_mask"]  # what serves a long prompt that is alone in its cache serves a short one
        elif fits is not None:
            masked = layer_mask(rows, begun.stored, embeds, self._anatomy.backend, fits)
        else:
            # Without a mask and a cache, gaps between positions would read as several packed sequences.
            masked = prefill_mask(
                widened(rows.valid, embeds.shape[0], begun.stored + embeds.shape[1], True, embeds.device),
                rows.bias,
                layer.dropped if layer is not None else 0,
                embeds,
                self._anatomy.backend,
            )
        features = shortened_deepstack(kwargs, short.shorten)
        return {
            **kwargs,
            **features,
            "inputs_embeds": embeds,
            "position_ids": begun.positions,
            "attention_mask": masked,
        }

    def _settled(self) -> Passage | None:
        """The passage of the prefill under way; of one that was replayed it is told here, beside the device's work."""
        if self._later is not None:
            self._passage, self._later = self._later(), None
            self.last = self._passage.report()
        return self._passage

    def _after_decoder(self, decoder: nn.Module, args: Any, output: Any) -> Any:
        if self._whole is not None and self._glance is not None:
            self._tell(*self._whole, self._glance)
            self._whole = None
        passage = self._settled()
        if passage is None or not passage.shortened:
            return None
        passage.finish()
        return restored(output, passage.lengthen)

    def _after_turns(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """A layer's arguments after pruned turns, with a mask of its own; None where the first layer's serves."""
        cache = cache_in(kwargs)
        known = logical(cache, number)
        if known is None or not (self._anatomy.has_windows or known.history != cache.layers[0].history):
            return None
        window = self._anatomy.window_of(number)
        key = (known.history, window, hidden.device)
        if key not in self._layer_masks:
            self._layer_masks[key] = cache_layer_masks(cache, number, hidden, self._anatomy.backend, window)
        return {**kwargs, "attention_mask": self._layer_masks[key]}

    def _before_layer(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        passage, hidden = self._settled(), args[0]
        if passage is not None and passage.deciding:
            return None  # a scorer has the whole prompt read by the layers
        if passage is not None and number:
            hidden, short = passage.enter(number, hidden)
            if short is not None:
                self.last = passage.report()
        # (None is told from a dict, not one dict from another: that breaks the graphs of torch 2.11.)
        changed = (
            self._after_turns(number, hidden, kwargs)
            if passage is None
            else passage.layer_arguments(number, hidden, kwargs)
        )
        if "flash" in self._anatomy.backend and kwargs.get("position_ids") is not None:
            # Flash attention reads gaps between position ids as borders of packed sequences; rotations are computed
            # already.
            changed = {**(kwargs if changed is None else changed), "position_ids": None}
        return None if changed is None else ((hidden, *args[1:]), changed)

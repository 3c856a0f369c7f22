"""Decoding by CUDA graphs: one step of a text decoder is recorded, and replayed for every token.

Letters: B batch, K capacity of the cache.

A step against a static cache launches the same kernels on the same memory every time; what differs
are a few small inputs. They are copied into the memory that the recording reads. A recording
belongs to the memory of one cache, which is handed on to the next (`cache_memory`), so `generate`
records once, on the first token after a prompt, and not again for prompts of as many rows and texts
that are no longer. Whatever is no such step runs as before, and the reason is said once.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import BaseModelOutputWithPast

from interlace.nn import preparing
from interlace.nn.cache_memory import CACHE, CacheMemory, is_static, memory_of, same_memory
from interlace.nn.layers import FusedAttention
from interlace.nn.masks import Pattern, attach, pattern_of
from interlace.nn.stepping import stepping
from interlace.nn.swap import autocasting, listened_to, makeup

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from interlace.nn.recorders import Recorder

_log = logging.getLogger("interlace.nn")
# of the kernels that choose or load something on their first calls
_WARM_UPS = 2
# what generate asks on a GPU before it compiles a model by itself
_COMPILES = "_valid_auto_compile_criteria"
_TENSORS = ("input_ids", "inputs_embeds", "position_ids")


class _Recording:
    """One step of a decoder against one cache, and the memory that it reads."""

    def __init__(
        self, decoder: Any, stock: Callable[..., Any], kwargs: dict[str, Any], *, overlap: bool
    ) -> None:
        self._overlap = overlap
        self.cache = weakref.ref(kwargs[CACHE])
        self._kept = memory_of(kwargs[CACHE])
        self.shapes = _shapes(kwargs)
        self.makeup = makeup(decoder.modules())
        self._inputs: dict[str, Any] = {
            name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)
        }
        self._masks = {name: _copied(mask) for name, mask in _masks(kwargs).items()}
        mask = kwargs["attention_mask"]
        self._inputs["attention_mask"] = (
            self._masks if isinstance(mask, dict) else self._masks.get("")
        )
        self._others = {
            name: value
            for name, value in kwargs.items()
            if name not in self._inputs and name != CACHE
        }
        self._stock = stock
        self._replay: Callable[[], None] | None = None
        self._result: Tensor | None = None

    def _step(self) -> Tensor:
        cache = self.cache()
        with stepping(cache, overlap=self._overlap):
            out = self._stock(**self._inputs, **self._others, **{CACHE: cache})
        for mask in self._masks.values():
            _move_on(mask)
        result: Tensor = out.last_hidden_state
        return result

    def masks_ahead(self) -> dict[str, Any] | None:
        """The masks of the coming step after a replay; None where they do not move on."""
        return self._masks if all(_moves(mask) for mask in self._masks.values()) else None

    def takes(self, cache: Any) -> bool:
        """Tell whether a cache lies in the memory that was recorded, and follow it there."""
        if not same_memory(self._kept, memory_of(cache)):
            return False
        if self.cache() is not cache:
            self.cache = weakref.ref(cache)
        return True

    def record(self, recorder: Recorder) -> None:
        """Warm up and record; the cache is as it was afterwards, but for the coming token."""
        cache: Any = self.cache()
        lengths = [length for _, _, length in memory_of(cache).values()]
        before = [length.clone() for length in lengths]

        def rewind() -> None:
            for length, value in zip(lengths, before, strict=True):
                length.copy_(value)

        try:
            for _ in range(_WARM_UPS):
                # writes keys and values of the coming token, as the replay will
                recorder.warm_up(self._step)
                rewind()
            self._replay, self._result = recorder.record(self._step)
        finally:
            rewind()

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """Replay the step on other inputs of the same shapes."""
        assert self._replay is not None
        assert self._result is not None
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and name != "attention_mask":
                self._inputs[name].copy_(value)
        for name, mask in _masks(kwargs).items():
            if mask is not self._masks[name]:
                _copy_mask(mask, self._masks[name])
        self._replay()
        # the next replay fills the same memory
        return self._result.clone()


class GraphedForward:
    """The forward of a text decoder that records and replays its steps.

    Attributes:
        reason: why steps are not recorded; empty as long as they are.
        num_recordings: how often a step was recorded.
        num_replays: how often one was replayed.
    """

    def __init__(self, decoder: nn.Module, recorder: Recorder, *, overlap: bool = False) -> None:
        self._decoder = decoder
        self._recorder = recorder
        self._overlap = overlap
        self._recording: _Recording | None = None
        self._memory = CacheMemory()
        self._hooks = -1
        self._trusted = self._replayed = False
        # transformers reads from it what a model takes
        self.__signature__ = inspect.signature(type(decoder).forward.__get__(decoder))
        self.reason = ""
        self.num_recordings = self.num_replays = 0

    @functools.cached_property
    def _num_attentions(self) -> int:
        """As many places of a cache are filled by a prompt."""
        return sum(isinstance(each, FusedAttention) for each in self._decoder.modules())

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy of the decoder record for itself."""
        made = functools.partial(GraphedForward, overlap=self._overlap)
        return made, (self._decoder, self._recorder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder; arguments and result are those of its class."""
        decoder = self._decoder
        stock = type(decoder).forward
        if torch.compiler.is_compiling():
            return stock(decoder, *args, **kwargs)
        if args or not self._is_step(kwargs):
            # weights may be put elsewhere between two texts, but not between two tokens
            self._trusted = self._replayed = False
            return self._other(*args, **kwargs)
        recording = self._recording
        if recording is None or not self._fits(recording, kwargs):
            recording = None if self._was_reordered(kwargs[CACHE]) else self._record(kwargs)
        self._replayed = recording is not None
        if recording is None:
            return stock(decoder, **kwargs)
        self.num_replays += 1
        hidden = recording.run(kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: kwargs[CACHE]})

    def masks_ahead(self, cache: Any) -> dict[str, Any] | None:
        """The masks of the step after one that was replayed against a cache; None without any."""
        recording = self._recording if self._replayed else None
        if recording is None or cache is None or recording.cache() is not cache:
            return None
        return recording.masks_ahead()

    def _other(self, *args: Any, **kwargs: Any) -> Any:
        """Run what is no step; a static cache gets the memory of the last one."""
        stock, cache = type(self._decoder).forward, kwargs.get(CACHE)
        first: Any = kwargs.get("inputs_embeds")
        first = kwargs.get("input_ids") if first is None else first
        like = next(self._decoder.parameters())
        keeps = not (args or first is None or torch.is_grad_enabled() or autocasting(like))
        if keeps:
            self._memory.lend(cache, len(first), like)
        out = stock(self._decoder, *args, **kwargs)
        if keeps:
            self._memory.keep(cache)
        return out

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Tell whether a call is one token per row against a static cache, and nothing else."""
        cache: Any = kwargs.get(CACHE)
        if self.reason or torch.is_grad_enabled() or not is_static(cache):
            return False
        first = kwargs.get("inputs_embeds")
        first = kwargs.get("input_ids") if first is None else first
        if first is None or first.shape[1] != 1 or first.device != self._recorder.device:
            return False
        if len(memory_of(cache)) != self._num_attentions:
            return False
        config = self._decoder.config
        asked = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(each) or getattr(config, each, False) for each in asked):
            return False
        masks = _masks(kwargs)
        if not masks or any(mask is None or pattern_of(mask) is None for mask in masks.values()):
            return False
        known = (*_TENSORS, "attention_mask", CACHE)
        return all(
            name in known or value is None or isinstance(value, bool | int | float | str)
            for name, value in kwargs.items()
        )

    def _fits(self, recording: _Recording, kwargs: dict[str, Any]) -> bool:
        if not recording.takes(kwargs[CACHE]):
            return False
        if recording.shapes != _shapes(kwargs) or self._hooks != RemovableHandle.next_id:
            return False
        if not self._trusted:
            same = recording.makeup == makeup(self._decoder.modules())
            self._trusted = same and not self._heard()
        return self._trusted

    def _was_reordered(self, cache: Any) -> bool:
        """Tell whether a cache has moved since it was filled, and so will move again.

        Beam search gives it other memory after every token, which no recording would follow.
        """
        if self._memory.left_by(cache):
            return True
        recording = self._recording
        return recording is not None and recording.cache() is cache and not recording.takes(cache)

    def _heard(self) -> bool:
        return listened_to(each for each in self._decoder.modules() if each is not self._decoder)

    def _record(self, kwargs: dict[str, Any]) -> _Recording | None:
        self._recording = None
        if self._heard():
            # hooks do not run in a replay; they may be gone by the next text
            return None
        recording = _Recording(self._decoder, _bound(self._decoder), kwargs, overlap=self._overlap)
        try:
            recording.record(self._recorder)
        except RuntimeError as error:
            self.reason = f"recording a step failed: {error}"
            _log.warning(
                "%s decodes without CUDA graphs, because %s",
                type(self._decoder).__name__,
                self.reason,
            )
            return None
        self.num_recordings += 1
        self._recording, self._trusted = recording, True
        self._hooks = RemovableHandle.next_id
        return recording


def install(
    target: nn.Module, decoders: Sequence[nn.Module], recorder: Recorder, *, overlap: bool = False
) -> list[GraphedForward]:
    """Let decoders record and replay their steps.

    Args:
        target: the model that generates; it no longer compiles its forward by itself.
        decoders: text decoders in it.
        recorder: of their device.
        overlap: kernels of a step may start before those in front of them have ended.
    """
    forwards = []
    for decoder in decoders:
        forwards.append(GraphedForward(decoder, recorder, overlap=overlap))
        decoder.__dict__["forward"] = forwards[-1]
    if hasattr(type(target), _COMPILES):
        target.__dict__[_COMPILES] = functools.partial(_compiles, target)
        if len(forwards) == 1:
            preparing.install(target, forwards[0])
    return forwards


def remove(target: nn.Module) -> None:
    """Undo `install`."""
    for module in target.modules():
        if isinstance(module.__dict__.get("forward"), GraphedForward):
            del module.__dict__["forward"]
    target.__dict__.pop(_COMPILES, None)
    preparing.remove(target)


def _compiles(target: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """Tell generate whether to compile the forward: only where it was asked to in so many words."""
    if generation_config.compile_config is None:
        return False
    return bool(getattr(type(target), _COMPILES)(target, model_kwargs, generation_config))


def _bound(decoder: Any) -> Callable[..., Any]:
    def stock(**kwargs: Any) -> Any:
        return type(decoder).forward(decoder, **kwargs)

    return stock


def _masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The masks of a step by the kind of layer they are for; "" where there is one for all."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        return mask
    return {"": mask}


def _copied(mask: Tensor) -> Tensor:
    pattern = pattern_of(mask)
    assert pattern is not None
    copy = mask.clone()
    starts, lengths = pattern.starts.clone(), pattern.lengths.clone()
    attach(copy, Pattern(pattern.causal, pattern.window, starts, lengths))
    return copy


def _copy_mask(source: Tensor, target: Tensor) -> None:
    new, old = pattern_of(source), pattern_of(target)
    assert new is not None
    assert old is not None
    target.copy_(source)
    old.starts.copy_(new.starts)
    old.lengths.copy_(new.lengths)


def _moves(mask: Tensor) -> bool:
    """Tell whether the mask of a step becomes that of the next by one more visible key."""
    pattern = pattern_of(mask)
    return pattern is not None and pattern.window is None


def _move_on(mask: Tensor) -> None:
    """Let the coming token be seen too, of which a cache has no more than it can hold."""
    pattern = pattern_of(mask)
    if pattern is None or pattern.window is not None:
        return
    capacity = mask.shape[-1]
    place = pattern.lengths.clamp(max=capacity - 1).long()
    mask.scatter_(-1, place[:, None, None, None].expand(*mask.shape[:-1], 1), value=True)
    pattern.lengths.add_(1).clamp_(max=capacity)


def _shapes(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for a recording to serve: shapes of inputs, and everything plain."""
    inputs = tuple(
        (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, value)
        for name, value in sorted(kwargs.items())
        if name not in ("attention_mask", CACHE)
    )
    # tensors of inference mode are not written outside of it
    inference = torch.is_inference_mode_enabled()
    return (
        inference,
        inputs,
        tuple((name, tuple(mask.shape)) for name, mask in _masks(kwargs).items()),
    )

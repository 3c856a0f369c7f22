"""Blocks by CUDA graphs: passes of many tokens, as prompts and images are, of a shape seen before.

With a few thousand tokens a modern GPU is done with a block sooner than Python has launched its
kernels. A block that is called with inputs of the same shapes a second time is recorded, one graph
per block, and replayed from then on; inputs of a new shape run as before. What happens between the
blocks stays as transformers wrote it.

What a recording reads lies in memory of its own: inputs are copied there, except the result of
another recording (of the block before), which is read where it lies. What a recording gives lies in
memory that its next replay fills again, so whatever may keep it gets a copy: hooks of the block and
of the one behind it, what was put in the place of that one's forward, and whatever is no such
block. A replay counts up no version of its memory, so nobody could see the change. Of several
threads one at a time replays, from block to block; the others run the blocks meanwhile.
"""

from __future__ import annotations

import collections
import copy
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from interlace.nn.attention import NAME
from interlace.nn.layers import longest
from interlace.nn.masks import Pattern, attach, pattern_of
from interlace.nn.norms import bear, borne_by
from interlace.nn.swap import STATE, autocasting, collected, hooked, listened_to, makeup
from interlace.ops import _selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from interlace.nn.recorders import Recorder

_log = logging.getLogger("interlace.nn")
# with more tokens the GPU works longer on a block than Python takes to launch it
MOST_ROWS = 8192
# shapes that a block keeps recordings of; the one that was not used for longest goes first
_MOST_SHAPES = 4
# marks the result of a recording
_STATIC = "interlace_static"


class Shelf:
    """What the blocks of a model share: memory of inputs that all of them read.

    Attributes:
        recorder: of the device.
        reason: why blocks are not recorded; empty as long as they are.
    """

    def __init__(self, recorder: Recorder) -> None:
        """Start empty."""
        self.recorder = recorder
        self.reason = ""
        # the recordings that read a place keep it
        self._places: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self._copied: dict[Any, tuple[weakref.ref[Tensor], int | None]] = {}
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None

    def hold(self) -> bool:
        """Take all memory of recordings for this thread; False while another one has it."""
        own = threading.current_thread()
        with self._lock:
            if self._holder is None or not self._holder.is_alive():
                self._holder = own
            return self._holder is own

    def release(self) -> None:
        """Give it free: nothing in it is read any more."""
        with self._lock:
            if self._holder is threading.current_thread():
                self._holder = None

    def place(self, name: str, source: Tensor) -> Tensor:
        """Copy an input to its place, unless it is what was copied there last."""
        key = (name, _form(source), torch.is_inference_mode_enabled())
        # tensors of inference mode do not count their changes, wherever they are used
        version = None if source.is_inference() else source._version
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = source.clone()
        else:
            last, before = self._copied[key]
            if last() is source and version is not None and version == before:
                return place
            place.copy_(source)
        self._copied[key] = weakref.ref(source), version
        return place

    def __reduce__(self) -> tuple[Any, ...]:
        """Give the copy of a model memory of its own."""
        return Shelf, (self.recorder,)


@dataclass
class _Recording:
    """A recorded block.

    Attributes:
        replay: runs it.
        hidden: what it reads: memory of its own, or another recording's result.
        places: further memory that it reads.
        result: what it fills.
        normed: the norm that the result bears: the module, and what it gives.
    """

    replay: Callable[[], None]
    hidden: Tensor
    places: list[Tensor]
    result: Tensor
    normed: tuple[nn.Module, Tensor] | None


class BlockGraph:
    """The recordings of one block.

    Attributes:
        num_recordings: how often the block was recorded.
        num_replays: how often a recording was replayed.
    """

    def __init__(self, shelf: Shelf, stack: nn.Module | None, following: str) -> None:
        """Start without recordings.

        Args:
            shelf: of all blocks of the model.
            stack: what holds the block; None where it is by itself.
            following: name there of what reads the block's result; empty for the last block.
        """
        self._shelf, self._following = shelf, following
        # the stack holds the block, and that holds its recordings
        self._stack = None if stack is None else weakref.ref(stack)
        self._recordings: collections.OrderedDict[Any, _Recording] = collections.OrderedDict()
        self._seen: collections.deque[Any] = collections.deque(maxlen=2 * _MOST_SHAPES)
        self.num_recordings = self.num_replays = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockGraph:
        """Let a copy of the block record for itself."""
        shelf = copy.deepcopy(self._shelf, memo)
        # of a block that is copied alone, anything may read the result
        stack = None if self._stack is None else memo.get(id(self._stack()))
        return BlockGraph(shelf, stack, self._following)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a block that is read from a file record for itself."""
        stack = None if self._stack is None else self._stack()
        return BlockGraph, (self._shelf, stack, self._following)

    def __call__(
        self, block: Any, run: Callable[..., Tensor], hidden: Tensor, others: dict[str, Any]
    ) -> Tensor:
        """Replay, record or run a block.

        Args:
            block: the block.
            run: its forward.
            hidden: [..., T, D], what it works on.
            others: its further arguments by name.
        """
        if torch.compiler.is_compiling():
            return run(hidden, **others)
        moved = hidden.device != self._shelf.recorder.device
        if self._shelf.reason or moved or not _may_record(block, hidden):
            return self._run(run, hidden, others)
        inputs = _Inputs(block, others)
        if inputs.unknown:
            return self._run(run, hidden, others)
        modules = list(block.modules())
        kind = (_form(hidden), _state(modules), inputs.key)
        # a result bears a norm that is read too, so a recording that reads one reads no other
        static = id(hidden) if hasattr(hidden, _STATIC) else None
        key = (static, kind)
        recording = self._recordings.get(key)
        if recording is None and kind not in self._seen:
            self._seen.append(kind)
            return self._run(run, hidden, others)
        # looked up anew at every call: no count tells that a forward was replaced
        if listened_to(modules[1:]):
            return self._run(run, hidden, others)
        if not self._shelf.hold():
            return self._run(run, hidden, others)
        if recording is None:
            recording = self._record(run, hidden, inputs, static is not None)
            if recording is None:
                return self._run(run, hidden, others)
            self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > _MOST_SHAPES:
            self._recordings.popitem(last=False)
        return self._replayed(block, recording, hidden, inputs)

    def _run(self, run: Callable[..., Tensor], hidden: Tensor, others: dict[str, Any]) -> Tensor:
        """Run a block, on memory that its parts and their hooks may keep."""
        if hasattr(hidden, _STATIC):
            hidden = hidden.clone()
        self._shelf.release()
        return run(hidden, **others)

    def _record(
        self, run: Callable[..., Tensor], hidden: Tensor, inputs: _Inputs, is_static: bool
    ) -> _Recording | None:
        # kernels were chosen and loaded when the block ran with these shapes before
        memory = hidden if is_static else hidden.clone()
        places = inputs.fill(self._shelf)
        others = inputs.arguments(places)
        try:
            replay, result = self._shelf.recorder.record(lambda: run(memory, **others))
        except RuntimeError as error:
            self._shelf.reason = f"recording a block failed: {error}"
            _log.warning("Blocks run without CUDA graphs, because %s", self._shelf.reason)
            return None
        self.num_recordings += 1
        setattr(result, _STATIC, True)
        return _Recording(replay, memory, list(places.values()), result, borne_by(result))

    def _replayed(
        self, block: Any, recording: _Recording, hidden: Tensor, inputs: _Inputs
    ) -> Tensor:
        if hidden is not recording.hidden:
            recording.hidden.copy_(hidden)
        inputs.fill(self._shelf)
        recording.replay()
        self.num_replays += 1
        result = recording.result
        if block._forward_hooks or self._may_be_kept():
            result = result.clone()
            self._shelf.release()
            return result
        if recording.normed is not None:
            bear(result, *recording.normed)
        return result

    def _may_be_kept(self) -> bool:
        """Tell whether anything but a fused block, and that alone, reads the result."""
        stack = None if self._stack is None else self._stack()
        following: Any = getattr(stack, self._following, None)
        # hooks within that block are given a copy by its own BlockGraph
        graph = getattr(getattr(following, STATE, None), "graph", None)
        return graph is None or hooked(following)


class _Inputs:
    """Arguments of a block beside what it works on: tensors, and what shapes the work on them.

    Attributes:
        key: what has to be equal for a recording to serve.
        unknown: there is something that a recording cannot read.
    """

    def __init__(self, block: Any, others: dict[str, Any]) -> None:
        self._others = others
        # every tensor by the name of its place
        self._tensors: dict[str, Tensor] = {}
        self.unknown = False
        self.key = tuple((name, self._part(block, name, value)) for name, value in others.items())

    def _part(self, block: Any, name: str, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, tuple | list) and all(isinstance(each, Tensor) for each in value):
            self._tensors |= {f"{name}.{i}": each for i, each in enumerate(value)}
            return tuple(_form(each) for each in value)
        if type(value) is StaticCache:
            return self._memory(block, value)
        if not isinstance(value, Tensor):
            self.unknown = True
            return None
        self._tensors[name] = value
        if name == "cu_seqlens":
            # the longest sequence decides how many programs are launched
            return _form(value), longest(value)
        pattern = pattern_of(value)
        if pattern is None:
            return _form(value), None
        self._tensors |= {f"{name}.starts": pattern.starts, f"{name}.lengths": pattern.lengths}
        if pattern.cuts is not None:
            self._tensors |= zip((f"{name}.queries", f"{name}.keys"), pattern.cuts, strict=True)
        return _form(value), (pattern.causal, pattern.window)

    def _memory(self, block: Any, cache: Any) -> Any:
        place = getattr(getattr(block, "self_attn", None), "layer_idx", None)
        layer: Any = None if place is None else cache.layers[place]
        if type(layer) is not StaticLayer or not layer.is_initialized:
            self.unknown = True
            return None
        return tuple(
            each.data_ptr() for each in (layer.keys, layer.values, layer.cumulative_length)
        )

    def fill(self, shelf: Shelf) -> dict[str, Tensor]:
        """Copy all tensors to their places, and return these by name."""
        return {name: shelf.place(name, source) for name, source in self._tensors.items()}

    def arguments(self, places: dict[str, Tensor]) -> dict[str, Any]:
        """Return the arguments with the places for the tensors, for a recording to read."""
        found: dict[str, Any] = {}
        for name, value in self._others.items():
            found[name] = places.get(name, value)
            if isinstance(value, tuple | list):
                found[name] = tuple(places[f"{name}.{i}"] for i in range(len(value)))
            elif isinstance(value, StaticCache):
                # the recording is of its memory, and must not keep the cache itself
                found[name] = copy.copy(value)
            elif isinstance(value, Tensor):
                pattern = pattern_of(value)
                if pattern is not None:
                    attach(found[name], _placed_pattern(name, pattern, places))
                if name == "cu_seqlens":
                    found[name].interlace_longest = longest(value)
        return found


def _placed_pattern(name: str, pattern: Pattern, places: dict[str, Tensor]) -> Pattern:
    cuts = None
    if pattern.cuts is not None:
        cuts = places[f"{name}.queries"], places[f"{name}.keys"]
    starts, lengths = places[f"{name}.starts"], places[f"{name}.lengths"]
    return Pattern(pattern.causal, pattern.window, starts, lengths, cuts)


def _may_record(block: Any, hidden: Tensor) -> bool:
    """Tell whether a call is of the kind that recordings are made of."""
    if torch.is_grad_enabled() or block.training:
        return False
    # what stands in the place of the forward may keep the result
    if "forward" in vars(block):
        return False
    if hidden.dim() < 2 or hidden.shape[-2] == 1 or autocasting(hidden):
        return False
    if not 0 < hidden.numel() // hidden.shape[-1] <= MOST_ROWS:
        return False
    # of what transformers collects, a replay gives hidden states alone
    if collected() - {"hidden_states"}:
        return False
    if not attends_by_ours(block):
        return False
    return not (hidden.is_cuda and torch.cuda.is_current_stream_capturing())


def attends_by_ours(block: Any) -> bool:
    """Tell whether the attention of a block is ours, as far as its config decides."""
    config = getattr(getattr(block, block.interlace_state.attention), "config", None)
    implementation: str = getattr(config, "_attn_implementation", NAME)
    return implementation == NAME


def _state(modules: list[nn.Module]) -> tuple[Any, ...]:
    """What else a recording depends on: the modules, and which backends serve."""
    return torch.is_inference_mode_enabled(), _selection.resolve("auto"), makeup(modules)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device

"""Small torch helpers that several stages share: quiet models, moving batches, processes."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from interlace.errors import DataError, InterlaceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

# Numbers of the groups that this process has joined of its own accord.
_GROUPS = itertools.count()

# What a forward raises when its inputs do not suit the model.
FORWARD_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ImportError,
)


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Run a block outside of the caller's `torch.inference_mode`; gradients stay on or off.

    Tensors made in that mode count no writes, and can be neither changed nor trained outside of it.
    """
    graded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(graded):
        yield


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode without gradients, and put every module's own mode back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # not inference_mode, the caller's included: rotary tables rebuilt inside it could not be
        # trained through later
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a block without a KV cache in any part of a model, and restore every config after it."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    try:
        for config in caching:
            config.use_cache = False
        yield
    finally:
        for config in caching:
            config.use_cache = True


def rounding_tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways to compute the same may be apart, as a share of the largest value.

    Rounding stays below it, a wrong way does not.
    """
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(dtype, 5e-2)


def accepts(model: nn.Module, argument: str) -> bool:
    """Tell whether a model's forward names an argument."""
    return argument in inspect.signature(model.forward).parameters


def default_device() -> str:
    """Return the GPU of this process, where there is one, else "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    # torchrun starts a process for each GPU
    if "LOCAL_RANK" not in os.environ:
        return "cuda"
    # a launcher may also show every process a GPU of its own
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"


def process_rank() -> tuple[int, int]:
    """Return this process's number and how many there are; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def leave_processes() -> None:
    """Destroy the default group of torch.distributed, where this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined_processes() -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started for a block, unless they are joined already.

    Yields:
        This process's number and how many there are.
    """
    own = dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized()
    if own:
        # Its default arguments hold the group that they find, past its end: the threads of that
        # group then die with the interpreter, and now and again take it down with an abort.
        import torch.distributed.nn  # noqa: F401
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        # The store of the launcher remembers where the processes of an earlier group listened.
        found, rank, world = next(iter(rendezvous("env://")))
        store = PrefixStore(f"interlace-{next(_GROUPS)}", found)
        # Only small sums travel, so the processes need not talk through the GPUs.
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        yield process_rank()
    finally:
        if own:
            leave_processes()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a CPU tensor over all processes; every process calls it."""
    if process_rank()[1] == 1:
        return values
    # NCCL knows tensors on a GPU only.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = values.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def union_over_processes(found: Mapping[str, str]) -> dict[str, str]:
    """Return what any process has found, of several the first one's; every process calls it."""
    if process_rank()[1] == 1:
        return dict(found)
    gathered: list[dict[str, str]] = [{} for _ in range(process_rank()[1])]
    dist.all_gather_object(gathered, dict(found))
    return {key: text for each in reversed(gathered) for key, text in each.items()}


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Stop all processes where one of them fails within the block; every process enters it.

    Without it the healthy ones would wait for the sums of the failed one for ever.

    Raises:
        DataError: in the processes that are healthy, with the message of one that is not.
    """
    message = "it broke off"
    try:
        yield
        message = ""
    except InterlaceError as error:
        message = str(error)
        raise
    finally:
        _agree_on_failure(message)


def _agree_on_failure(message: str) -> None:
    rank, world = process_rank()
    if world == 1:
        return
    messages: list[str] = [""] * world
    dist.all_gather_object(messages, message)
    failed = [(other, each) for other, each in enumerate(messages) if each]
    if failed and not message:
        other, text = failed[0]
        raise DataError(f"Process {other} of {world} failed, so process {rank} stops: {text}")

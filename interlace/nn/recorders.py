"""What records a function once and replays it: CUDA graphs, or a stand-in of the tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Recorder(Protocol):
    """Records a function once and replays it, on the memory it was recorded with.

    Attributes:
        device: where this works; what runs on another one cannot be replayed.
    """

    device: torch.device

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """Run a function as it will be recorded."""

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Record a function; return how to replay it, and the result that a replay fills."""


class CudaRecorder:
    """Records CUDA graphs, which share memory for what they do not keep."""

    def __init__(self, device: torch.device) -> None:
        """Start without memory.

        Args:
            device: of the model; a graph captures nothing of another one.
        """
        self.device = device
        self._pool: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies have memory of their own, which other processes do not know."""
        return CudaRecorder, (self.device,)

    def warm_up(self, step: Callable[[], Tensor]) -> None:
        """Run a function on a stream of its own, as capturing asks for."""
        with torch.cuda.device(self.device):
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)

    def record(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture a graph; nothing runs yet."""
        with torch.cuda.device(self.device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                result = step()
        return graph.replay, result

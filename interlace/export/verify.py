"""Proof that a checkpoint loads in a fresh process and computes what it did in memory.

A standard one is loaded by transformers alone, one that is not by `open_model`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from interlace._torch_utils import FORWARD_REFUSALS, inference
from interlace.errors import CheckpointError
from interlace.export import _reload
from interlace.models.attention import NAME
from interlace.models.handle import to_model
from interlace.models.synthetic import synthetic_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from interlace.models.handle import VLM

# Rounding steps, at the size of the largest value, by which two runs of one model may differ: they
# add up over the layers, but in 16 bits a step is already large.
_MAX_STEPS, _MAX_STEPS_16_BIT = 128, 4
_MAX_ERROR_LINES = 3


@dataclass(frozen=True)
class Verification:
    """How a reloaded checkpoint compared with the model in memory.

    Attributes:
        max_difference: largest absolute difference of any output value; 0.0 where all are
            bit-equal.
        max_value: largest absolute output value in memory, for scale.
        num_outputs: output tensors compared.
        towers: towers that took part in computing them.
        transformers: version that reloaded it.
    """

    max_difference: float
    max_value: float
    num_outputs: int
    towers: tuple[str, ...]
    transformers: str


def verify_checkpoint(
    vlm: VLM, folder: str | os.PathLike[str], *, inputs: Mapping[str, torch.Tensor] | None = None
) -> Verification:
    """Reload a checkpoint in a fresh process, and compare outputs.

    A standard one is loaded by transformers alone, one that is not by `open_model`.

    Args:
        vlm: what the folder should hold; left as it is.
        folder: the checkpoint.
        inputs: keyword arguments of the forward; default: small random images and tokens made from
            the config.

    Returns:
        How the two compare.

    Raises:
        CheckpointError: it does not load, lacks weights or has unknown ones, or computes something
            else.
    """
    return verify_checkpoints([(vlm, Path(folder), inputs)])[0]


def verify_checkpoints(
    jobs: Sequence[tuple[VLM, Path, Mapping[str, torch.Tensor] | None]],
) -> list[Verification]:
    """Do the same for several checkpoints in one fresh process; see `verify_checkpoint`."""
    with tempfile.TemporaryDirectory(prefix="interlace-verify-") as name:
        requests, expected = [], []
        for number, (vlm, folder, inputs) in enumerate(jobs):
            workspace = Path(name) / str(number)
            workspace.mkdir()
            used, outputs, towers = _in_memory(vlm, inputs)
            # cloned, since safetensors refuses tensors that share memory
            stored = {key: value.cpu().contiguous().clone() for key, value in used.items()}
            save_file(stored, workspace / "inputs")
            requests.append(_request(vlm, folder, workspace))
            expected.append((outputs, towers))
        _fresh_process(requests, Path(name))
        return [
            _compare(vlm, outputs, towers, request)
            for (vlm, _, _), (outputs, towers), request in zip(
                jobs, expected, requests, strict=True
            )
        ]


def _in_memory(
    vlm: VLM, inputs: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], tuple[str, ...]]:
    """Run the model on the given inputs, or on the first probe that it takes.

    Returns:
        The inputs, the outputs and the towers that ran.
    """
    makers: list[Callable[[], Mapping[str, torch.Tensor]]] = (
        [lambda: inputs] if inputs is not None else list(synthetic_inputs(vlm.model))
    )
    refusals = []
    for make in makers:
        ran: set[str] = set()
        with ExitStack() as stack:
            stack.enter_context(inference(vlm.model))
            stack.enter_context(_without_flags(vlm.model))
            for name, tower in vlm.towers.items():
                watch = partial(_note, ran, name)
                stack.enter_context(tower.layers[0].register_forward_pre_hook(watch))
            try:
                used = to_model(make(), vlm)
                outputs = _reload.run(vlm.model, used)
            except FORWARD_REFUSALS as error:
                refusals.append(f"{type(error).__name__}: {str(error).strip()[:200]}")
                continue
        return used, outputs, tuple(name for name in vlm.towers if name in ran)
    raise CheckpointError(
        f"{vlm.name} could not be run for verification ({'; '.join(refusals)}). Give inputs that "
        "its forward takes (inputs={...}), or export with verify=False."
    )


@contextmanager
def _without_flags(model: nn.Module) -> Iterator[None]:
    # torch.matmul picks its kernel by the flag of the weight even where no gradients are recorded,
    # and a reloaded model has other flags than one that was trained
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _note(ran: set[str], name: str, *_: object) -> None:
    ran.add(name)


def _request(vlm: VLM, folder: Path, workspace: Path) -> dict[str, Any]:
    return {
        "folder": str(folder.resolve()),
        "architecture": type(vlm.model).__name__,
        "standard": vlm.record is None or vlm.record.standard,
        "device": str(vlm.device),
        "attention": _attention(vlm.model.config),
        "threads": torch.get_num_threads(),
        **{name: str(workspace / name) for name in ("inputs", "outputs", "report")},
    }


def _attention(config: Any) -> dict[str, str]:
    """The attention implementation of a config and of each of its sub-configs, by key.

    Raises:
        CheckpointError: one that only this process knows, as that of a fused model.
    """
    parts = {"": config} | {key: getattr(config, key, None) for key in config.sub_configs}
    found = {key: getattr(part, "_attn_implementation", None) for key, part in parts.items()}
    named = {key: name for key, name in found.items() if isinstance(name, str)}
    for name in named.values():
        own = getattr(ALL_ATTENTION_FUNCTIONS.get(name), "__module__", "transformers")
        # those of the hub have a slash, and `open_model` knows NAME
        if own.partition(".")[0] != "transformers" and "/" not in name and name != NAME:
            raise CheckpointError(
                f"The model attends by '{name}', which transformers alone does not know, so a "
                "fresh process cannot compute the same. Export it unfused (unfuse), after "
                "set_attn_implementation('sdpa'), or with verify=False."
            )
    return named


def _fresh_process(requests: Sequence[Mapping[str, Any]], workspace: Path) -> None:
    listing = workspace / "requests.json"
    listing.write_text(json.dumps(requests), encoding="utf-8")
    # -P keeps the script's own folder, which is inside this package, off the import path.
    command = [sys.executable, "-P", str(Path(_reload.__file__)), str(listing)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=workspace, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-_MAX_ERROR_LINES:]
        raise CheckpointError(
            "The checkpoint does not reload in a fresh process (exit code "
            f"{done.returncode}): {' | '.join(lines)}"
        )


def _compare(
    vlm: VLM,
    expected: Mapping[str, torch.Tensor],
    towers: tuple[str, ...],
    request: Mapping[str, Any],
) -> Verification:
    report = json.loads(Path(request["report"]).read_text(encoding="utf-8"))
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(key):
            named = ", ".join(report[key][:5])
            raise CheckpointError(
                f"The checkpoint does not reload whole: {key.replace('_', ' ')} {named}. The "
                f"model in memory is not what {type(vlm.model).__name__} saves; remove adapters "
                "and run-time modules, then export again."
            )
    if report["package_loaded"] and request["standard"]:
        raise CheckpointError(
            "The fresh process imported interlace, so it proves nothing. Check sitecustomize."
        )
    found = load_file(request["outputs"])
    if found.keys() != expected.keys():
        raise CheckpointError(
            f"The reloaded checkpoint gives the outputs {sorted(found)}, the model in memory "
            f"{sorted(expected)}."
        )
    differences = [_difference(name, expected[name], found[name]) for name in expected]
    return Verification(
        max_difference=max(differences, default=0.0),
        max_value=max(map(_size, expected.values()), default=0.0),
        num_outputs=len(expected),
        towers=towers,
        transformers=str(report["transformers"]),
    )


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor) -> float:
    """Return the largest absolute difference of two outputs.

    Raises:
        CheckpointError: they differ in shape or dtype, or by more than rounding.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise CheckpointError(
            f"The reloaded checkpoint gives {name} as {_kind(found)}, the model in memory as "
            f"{_kind(expected)}. Bring all weights to one dtype before exporting."
        )
    if torch.equal(expected, found):
        return 0.0
    if bool(expected.isnan().any()):
        raise CheckpointError(
            f"The model in memory computes NaN in {name}, so the checkpoint cannot be compared "
            "with it. Check its weights; `score` says which layer it begins at."
        )
    difference = _size(expected.double() - found.double())
    steps = _MAX_STEPS if expected.dtype.itemsize > 2 else _MAX_STEPS_16_BIT
    allowed = steps * torch.finfo(expected.dtype).eps * max(_size(expected), 1.0)
    # written so that NaN fails
    if not difference <= allowed:
        raise CheckpointError(
            f"The checkpoint reloads, but computes something else: {name} differs by up to "
            f"{difference:.3g}, of which rounding explains {allowed:.3g}. It is not kept. (A model "
            "cast with .to(dtype) has rounded position tables; open it with that dtype instead.)"
        )
    return difference


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"

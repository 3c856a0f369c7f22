"""open_model: from a folder, a hub name or a loaded model to a VLM."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from interlace._files import home_path
from interlace._torch_utils import outside_inference_mode
from interlace.bundled import PREFIX, resolve
from interlace.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    FamilyError,
    ShapeError,
    unknown_name,
)
from interlace.models.bridges import bridged_class
from interlace.models.checkpoint import check_folder, read_manifest
from interlace.models.handle import VLM
from interlace.models.processor import has_processor, load_processor
from interlace.models.registry import FAMILIES, family_of, known_families, known_for
from interlace.models.widths import config_without_widths, with_widths

if TYPE_CHECKING:
    from interlace.records import PruneRecord

_log = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What transformers and huggingface_hub raise for names, files and configs they cannot use.
_LOAD_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    ImportError,
    AttributeError,
    StrictDataclassError,
    ShapeError,
)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConfigError(unknown_name("dtype", dtype, _DTYPES))
    return _DTYPES[dtype]


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={device!r} is no device; expected such as 'cpu' or 'cuda:0'."
        ) from error
    if wanted.type == "meta":
        raise ConfigError(
            "device='meta' holds shapes without values, so nothing can be run there. Use 'cpu' or "
            "'cuda'."
        )
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device='{device}' was asked for, but torch {torch.__version__} sees no CUDA device "
            "here. Use device='cpu'."
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise BackendError(
            f"device='{device}' was asked for, but torch sees {torch.cuda.device_count()} CUDA "
            "devices here, counted from 0."
        )
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise BackendError(
            f"device='{device}' was asked for, but torch {torch.__version__} cannot use it here: "
            f"{_first_line(error)} Use another, such as 'cpu'."
        ) from error
    return wanted


def _first_line(error: BaseException) -> str:
    """What an error says, without the advice that follows in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _model_class(path: str, trust_remote_code: bool, uneven: bool) -> tuple[Any, Any]:
    """The class to build, the one the checkpoint names or that of its family, and the config."""
    try:
        if uneven:
            config = config_without_widths(Path(path))
        else:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except _LOAD_FAILURES as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise FamilyError(
                f"{path} brings its own model code, which is not run unless asked for "
                f"(trust_remote_code=True). Known families: {known_families()}."
            ) from error
        if "model_type" in text or "model type" in text:
            quoted = re.search(r"model type `([^`]+)`", text)
            stated = f"'{quoted[1]}'" if quoted else "(none)"
            raise FamilyError(
                f"{path}: transformers {transformers.__version__} does not know its model type "
                f"{stated}. Known families: {known_families()}."
            ) from error
        raise CheckpointError(
            f"{path} cannot be opened: {_first_line(error)} Expected a checkpoint folder or the "
            "name of a model on the Hugging Face hub (and a connection, if it is not in the local "
            "cache)."
        ) from error
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    known = known_for(str(config.model_type))
    # A family covers one class here; where several share a type, the checkpoint must say which.
    candidates = named or ([known[0].architectures[0]] if len(known) == 1 else [])
    for name in candidates:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            _check_fit(path, found, config)
            return found, config
    if trust_remote_code:
        return transformers.AutoModelForImageTextToText, config
    expected = ", ".join(name for family in known or FAMILIES for name in family.architectures)
    raise FamilyError(
        f"{path}: its config names the class {', '.join(named) or '(none)'}, which transformers "
        f"{transformers.__version__} does not have. Expected one of: {expected}."
    )


def _check_fit(path: str, model_class: Any, config: Any) -> None:
    wanted = model_class.config_class
    if wanted is not None and not isinstance(config, wanted):
        raise FamilyError(
            f"{path}: its config names the class {model_class.__name__}, which is built from a "
            f"{wanted.__name__}, but states the model type '{config.model_type}'. One of the two "
            "is wrong."
        )


def _load(
    path: str,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    record: PruneRecord | None,
) -> PreTrainedModel:
    uneven = record is not None and bool(record.widths)
    model_class, config = _model_class(path, trust_remote_code, uneven)
    built: Any = model_class
    if record is not None:
        built = bridged_class(built, record.bridges)
        built = with_widths(built, record) if uneven else built
    try:
        model, report = built.from_pretrained(
            path,
            **({"config": config} if uneven else {}),
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            # So that they come back in the report, to be told apart below.
            ignore_mismatched_sizes=True,
        )
    except _LOAD_FAILURES as error:
        raise CheckpointError(
            f"{path}: the weights cannot be loaded: {_first_line(error)}"
        ) from error
    if built is not model_class:
        # widths and bridges are in the modules by now
        model.__class__ = model_class
    wrong = sorted(report["mismatched_keys"])
    if wrong:
        key, stored, built = wrong[0]
        raise CheckpointError(
            f"{path}: {len(wrong)} weights are not of the shape that the config says, such as "
            f"{key}: {list(stored)} instead of {list(built)}. The config does not fit the weights."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}. They would be random. The config does not fit the weights, "
            "or the checkpoint is of another class."
        )
    unused = sorted(report["unexpected_keys"])
    if unused:
        _log.warning(
            "%s: %d weights are not used, such as %s", path, len(unused), ", ".join(unused[:3])
        )
    return model


@outside_inference_mode()
def open_model(
    model_or_path: PreTrainedModel | str | os.PathLike[str],
    *,
    processor: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> VLM:
    """Open a vision-language model.

    Weights are read from safetensors only. A folder that `export` wrote brings its manifest, from
    which the layers keep their original numbers, and those that have widths of their own get them.

    Args:
        model_or_path: a checkpoint folder, the name of a model on the Hugging Face hub,
            "bundled:NAME" for a tiny model that comes with the package, or a loaded model. A loaded
            model is used as it is and moved or cast in place where `dtype` or `device` say so.
        processor: a loaded processor, or where to load one from; by default the one beside the
            weights.
        dtype: "float32", "bfloat16", "float16" or a torch dtype; by default as stored.
        device: such as "cuda"; by default the CPU for files, and no move for a loaded model.
        trust_remote_code: run code that the checkpoint brings along.

    Returns:
        The model with its towers, in eval mode.

    Raises:
        CheckpointError: the folder, a file in it or the manifest is missing, damaged or does not
            fit.
        FamilyError: the model is of no known family and did not pass the self-check.
        ConfigError: the model, `dtype` or `device` is no such thing.
        BackendError: the device is not there.
    """
    wanted_dtype, wanted_device = _dtype(dtype), _device(device)
    record: PruneRecord | None = None
    if isinstance(model_or_path, PreTrainedModel):
        model, name = model_or_path, str(getattr(model_or_path.config, "_name_or_path", "") or "")
        if wanted_dtype is not None:
            model.to(wanted_dtype)
    elif not isinstance(model_or_path, (str, os.PathLike)):
        raise ConfigError(
            f"open_model got a {type(model_or_path).__name__}; expected a checkpoint folder, the "
            "name of a model, or a loaded transformers model. Merge adapters into theirs, such as "
            "by merge_and_unload()."
        )
    else:
        given = str(model_or_path)
        if not given.strip():
            raise ConfigError("The name of the model is empty. Give a folder or a hub name.")
        name = resolve(given)
        folder = home_path(name)
        local = folder.exists()
        if local:
            name = str(folder)
            check_folder(folder)
            record = read_manifest(folder)
        elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
            raise CheckpointError(
                f"{name} does not exist. Expected a checkpoint folder, or a hub name such as "
                "'Qwen/Qwen3-VL-2B-Instruct'."
            )
        model = _load(name, wanted_dtype, trust_remote_code, record)
        # only what a plan tunes is ever trained, and a student is frozen but for that
        model.requires_grad_(False)
        if processor is None and (not local or has_processor(folder)):
            processor = load_processor(name, trust_remote_code)
        if given.startswith(PREFIX):
            # where the package is installed says nothing to the reader of a record
            name = given
    if isinstance(processor, (str, os.PathLike)):
        processor = load_processor(resolve(str(processor)), trust_remote_code)
    elif processor is not None and not callable(processor):
        raise ConfigError(
            f"processor is a {type(processor).__name__}; give a loaded processor, or the folder or "
            "name of the model that it lies beside."
        )
    if wanted_device is not None:
        model.to(wanted_device)
    model.eval()
    return VLM(model, family_of(model), processor=processor, name=name, record=record)

"""Loading processors, also those with a video part on a machine without torchvision.

transformers builds video processors on torchvision alone, so the processors of Qwen-VL and
LLaVA-OneVision do not load without it although images and text need nothing of it. There the same
class is built without its video part; what the checkpoint states about videos is carried along and
saved again, so that nothing is lost on the way through here.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

# not from the package's root, where older releases hide it on machines without torchvision
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from interlace.errors import CheckpointError

if TYPE_CHECKING:
    import os

_VIDEO = "video_processor"
# What a video part shares with the image part, where the checkpoint states nothing about videos.
_SHARED = ("patch_size", "merge_size", "temporal_patch_size", "image_mean", "image_std")
_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
# What transformers raises for processor files that are missing, damaged or of an unknown kind.
_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError)


class _WithoutVideo:
    """Mixed in before a processor class: the same processor, images and text only."""

    video_settings: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the class that transformers knows, since no module holds this one."""
        return _restored, (type(self).__bases__[1], self.__dict__)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts to load, check and save: all but the video part."""
        parts: list[str] = super().get_attributes()  # type: ignore[misc]
        return [name for name in parts if name != _VIDEO]

    def apply_chat_template(self, *arguments: Any, **settings: Any) -> Any:
        """Write a conversation as any processor does: what a class adds asks its video part."""
        return ProcessorMixin.apply_chat_template(self, *arguments, **settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save, with those of the video part as they were given."""
        settings: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        settings.pop("video_settings", None)
        return settings | {_VIDEO: dict(self.video_settings)}


@functools.cache
def _subclass(processor_class: type) -> type:
    return type(processor_class.__name__, (_WithoutVideo, processor_class), {})


def _restored(processor_class: type, state: dict[str, Any]) -> Any:
    subclass = _subclass(processor_class)
    processor: Any = object.__new__(subclass)
    processor.__dict__.update(state)
    return processor


def _default_video_settings(processor_class: type, image_processor: Any) -> dict[str, Any]:
    """Settings of a video part that treats frames as the image part treats images."""
    name = processor_class.__name__.removesuffix("Processor") + "VideoProcessor"
    shared = {key: getattr(image_processor, key, None) for key in _SHARED}
    return {"video_processor_type": name} | {k: v for k, v in shared.items() if v is not None}


def without_video(
    processor_class: type,
    image_processor: Any,
    tokenizer: Any,
    *,
    video_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Build a processor that has a video part, without it.

    Args:
        processor_class: such as `transformers.Qwen3VLProcessor`.
        image_processor: the image part.
        tokenizer: the tokenizer.
        video_settings: what is saved for the video part; by default the shared settings of the
            image part.
        settings: further arguments of the class, such as `chat_template`.

    Returns:
        An instance of a subclass of the same name, so that saved files name the original class.
    """
    # some classes ask for the part that is missing
    settings |= {_VIDEO: None}
    processor = _subclass(processor_class)(image_processor, tokenizer, **settings)
    processor.video_settings = video_settings or _default_video_settings(
        processor_class, image_processor
    )
    return processor


def _processor_class(path: str, stated: dict[str, Any]) -> type | None:
    """The processor class a checkpoint asks for, or None where transformers does not know it."""
    name = stated.get("processor_class")
    if name is None:
        model_type = AutoConfig.from_pretrained(path).model_type
        name = PROCESSOR_MAPPING_NAMES.get(model_type)
    found = getattr(transformers, str(name), None)
    return found if isinstance(found, type) and issubclass(found, ProcessorMixin) else None


def _load_without_video(path: str, processor_class: type, stated: dict[str, Any]) -> Any:
    video = stated.pop(_VIDEO, None)
    file = Path(path) / "video_preprocessor_config.json"
    if video is None and file.is_file():
        video = json.loads(file.read_text(encoding="utf-8"))
    accepted = {"chat_template", *processor_class.__init__.__code__.co_varnames}  # type: ignore[misc]
    parts = ("image_processor", "tokenizer", "self", "kwargs")
    return without_video(
        processor_class,
        AutoImageProcessor.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
        video_settings=video,
        **{k: v for k, v in stated.items() if k in accepted and k not in parts},
    )


def load_processor(path: str | os.PathLike[str], trust_remote_code: bool = False) -> Any:
    """Load the processor of a checkpoint.

    Args:
        path: a folder or the name of a model on the Hugging Face hub.
        trust_remote_code: run a processor class that the checkpoint brings along.

    Returns:
        The processor; without its video part where torchvision is missing.

    Raises:
        CheckpointError: the checkpoint has no processor, or its files are damaged.
    """
    name = str(path)
    try:
        if not is_torchvision_available() and not trust_remote_code:
            stated, _ = ProcessorMixin.get_processor_dict(name)
            found = _processor_class(name, stated)
            if found is not None and _VIDEO in found.get_attributes():  # type: ignore[attr-defined]
                return _load_without_video(name, found, stated)
        return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except _FAILURES as error:
        advice = (
            "Expected the files that `processor.save_pretrained` writes beside the model, or pass "
            "a loaded one as processor=."
        )
        if isinstance(error, ImportError):
            advice = (
                "Install what is missing (torchvision in the release that goes with this torch), "
                "or load the model by transformers and give it to open_model without a processor."
            )
        raise CheckpointError(
            f"{name}: the processor cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). {advice}"
        ) from error


def has_processor(folder: Path) -> bool:
    """Tell whether a folder holds any file of a processor."""
    return any((folder / name).is_file() for name in _FILES)

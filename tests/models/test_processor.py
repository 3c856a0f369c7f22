"""Processors, with and without torchvision."""

from __future__ import annotations

import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from interlace.errors import CheckpointError
from interlace.models import load_processor, open_model
from interlace.models.processor import without_video

if TYPE_CHECKING:
    from pathlib import Path

qwen2_vl_images = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

SPECIAL = ("<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer() -> Any:
    words = {word: i for i, word in enumerate((*SPECIAL, "<unk>", "a", "red", "disc"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    return fast


def images() -> Any:
    return qwen2_vl_images.Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32},
    )


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_without_video_saves_and_loads_as_the_original_class(tmp_path: Path) -> None:
    stated = {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 3, "patch_size": 8}
    processor = without_video(
        tf.Qwen3VLProcessor,
        images(),
        tokenizer(),
        video_settings=stated,
        chat_template=TEMPLATE,
    )
    assert isinstance(processor, tf.Qwen3VLProcessor)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor"
    assert saved["video_processor"] == stated
    again = load_processor(tmp_path)
    assert type(again).__name__ == "Qwen3VLProcessor"
    text = "<|vision_start|> <|image_pad|> <|vision_end|> a red disc"
    batch = again(images=[picture()], text=[text], return_tensors="pt")
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert (batch["input_ids"] == again.image_token_id).sum() == 4
    assert batch["mm_token_type_ids"].sum() == 4
    assert again.chat_template == TEMPLATE
    again.save_pretrained(tmp_path / "again")
    first = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert first["video_processor"]["fps"] == 3
    assert first["image_processor"]["patch_size"] == 8


def test_video_settings_follow_the_image_part_by_default() -> None:
    processor = without_video(tf.Qwen3VLProcessor, images(), tokenizer())
    assert processor.video_settings["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert processor.video_settings["patch_size"] == 8


def test_a_processor_without_video_part_can_be_pickled() -> None:
    processor = without_video(tf.Qwen3VLProcessor, images(), tokenizer())
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is type(processor)
    assert again.to_dict() == processor.to_dict()
    assert again.tokenizer("a red disc").input_ids == processor.tokenizer("a red disc").input_ids


def test_a_processor_without_video_part_and_a_folder_without_any(tmp_path: Path) -> None:
    from tiny import TINY
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    TINY["clip"](text=2, vision=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"processor cannot be loaded.*Expected the files"):
        load_processor(tmp_path)
    assert open_model(tmp_path).processor is None
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    tf.CLIPProcessor(CLIPImageProcessorPil(**sizes), tokenizer()).save_pretrained(tmp_path)
    vlm = open_model(tmp_path)
    assert type(vlm.processor) is tf.CLIPProcessor
    batch = vlm.processor(images=[picture()], text=["a red disc"], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_a_processor_whose_package_is_missing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ImportError("\nPixtralProcessor requires the Torchvision library.\nSee there.\n")

    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", fail)
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    with pytest.raises(CheckpointError, match=r"library\. See there\.\)\. Install what"):
        load_processor(tmp_path)

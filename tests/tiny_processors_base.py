"""Parts of tiny processors: a tokenizer that knows the words of the scenes, and a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tiny
import transformers as tf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from interlace.data.scenes import vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping

QWEN_MARKS = {
    "<|image_pad|>": tiny.IMAGE,
    "<|video_pad|>": tiny.VIDEO,
    "<|vision_start|>": tiny.VISION_START,
    "<|vision_end|>": tiny.VISION_END,
}
SIDE = tiny.IMAGE_SIDE


def chat_template(image: str, *, head: str = " ", stop: str = "[EOS]") -> str:
    """Role, `head`, texts and images, `stop`."""
    return (
        "{%- for message in messages -%}{{ message['role'] + " + repr(head) + " }}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ " + repr(image) + " }}"
        "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{ " + repr(stop) + " }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'assistant' + " + repr(head) + " }}{%- endif -%}"
    )


def word_tokenizer(
    *,
    frame: tuple[str, str] | None = None,
    limit: int = 64,
    marks: Mapping[str, int] = QWEN_MARKS,
    attributes: Mapping[str, str] | None = None,
) -> Any:
    """The ids that the tiny configs expect; `frame` puts a first and a last token around texts.

    Line breaks are words where `marks` holds some; `attributes` names marks, as processors ask for.
    """
    table = {"[PAD]": tiny.PAD, "[BOS]": tiny.BOS, "[EOS]": tiny.EOS, "[END]": 3, "[UNK]": 4}
    words = ("user", "assistant", "question", ":", "answer", *vocabulary())
    table |= {word: number for number, word in enumerate(dict.fromkeys(words), start=5)}
    table |= marks
    # every id is a word, so that random models say something
    table |= {f"w{number}": number for number in set(range(tiny.VOCAB)) - set(table.values())}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    breaks = {mark for mark in marks if mark.isspace()}
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Split(Regex(r"\n+|\w+|[^\w\s]+"), "removed", invert=True)
        if breaks
        else pre_tokenizers.Whitespace()
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    named = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    if frame:
        first, last = frame
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            special_tokens=[(first, table[first]), (last, table[last])],
        )
        named |= {"cls_token": first, "sep_token": last, "eos_token": last}
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=[word for word in marks if word not in breaks],
        model_specific_special_tokens=dict(attributes or {}),
        **named,
    )
    fast.model_max_length = limit
    return fast

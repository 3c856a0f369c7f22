"""PaliGemma, whose processor takes images and a question as prefix and the answer as suffix."""

from __future__ import annotations

import pytest
import torch
from data.made import sample, spoken
from tiny_processors import with_processor

from interlace.data.collate import Collator
from interlace.data.samples import Sample, Turn, samples
from interlace.errors import DataError
from interlace.evaluate.generate import prompt_batch

# NumPy about the tensors that the processor hands it
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

VLM = with_processor("paligemma")


def _sample(*turns: tuple[str, str], images: int = 1) -> Sample:
    pictures = sample("red", num_images=images).images if images else ()
    return Sample("one", "chat", pictures, tuple(Turn(*turn) for turn in turns))


SAMPLES = [
    _sample(("user", "<image>\nwhat is this?"), ("assistant", "a red circle")),
    _sample(("user", "how many?"), ("assistant", "no")),
    _sample(("user", "<image><image>a red or blue square?"), ("assistant", "yes"), images=2),
]


def test_labels_are_the_suffix_and_the_prefix_sees_no_answer() -> None:
    batch = Collator.for_model(VLM)(SAMPLES)
    answers = ["a red circle [EOS]", "no [EOS]", "yes [EOS]"]
    assert spoken(VLM.processor, batch) == answers
    # exactly what the loss reads is causal
    assert (batch["labels"] >= 0).equal(batch["token_type_ids"] == 1)
    tokenizer = VLM.processor.tokenizer
    line_break = tokenizer.convert_tokens_to_ids("\n")
    asked = Collator.for_model(VLM, answers=False)(SAMPLES)
    assert "labels" not in asked
    for row, one in enumerate(SAMPLES):
        ids = batch["input_ids"][row]
        prefix = ids[(batch["labels"][row] < 0) & batch["attention_mask"][row].bool()]
        assert prefix.equal(asked["input_ids"][row][asked["attention_mask"][row].bool()])
        # every image in front of the question, once each
        places = (prefix == VLM.model.config.image_token_id).nonzero().flatten().tolist()
        assert places == list(range(VLM.processor.image_seq_length * len(one.images)))
        question = one.turns[0].text.replace("<image>", "").strip()
        words = tokenizer(question, add_special_tokens=False)["input_ids"]
        assert prefix[len(places) :].tolist() == [tokenizer.bos_token_id, *words, line_break]


def test_a_batch_predicts_and_generates_what_its_samples_do_alone() -> None:
    collate = Collator.for_model(VLM)
    batch = collate(SAMPLES)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    with torch.no_grad():
        logits = VLM.model(**batch).logits
        asked = prompt_batch(VLM, SAMPLES)
        width = asked["input_ids"].shape[1]
        said = VLM.model.generate(**asked, **settings)[:, width:]
        for row, one in enumerate(SAMPLES):
            alone = collate([one])
            found = VLM.model(**alone).logits[0]
            mask = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[row][mask], found, rtol=1e-3, atol=1e-4)
            prompt = prompt_batch(VLM, [one])
            apart = VLM.model.generate(**prompt, **settings)[0, prompt["input_ids"].shape[1] :]
            assert said[row].equal(apart)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (_sample(("user", "what?"), ("assistant", "no"), images=0), "has 0 images and turns of"),
        (
            _sample(("user", "a?"), ("assistant", "no"), ("user", "b?"), ("assistant", "no")),
            "user, assistant, user, assistant.* takes images, one question and one answer",
        ),
        (_sample(("system", "be brief"), ("user", "a?"), ("assistant", "no")), "turns of system"),
        (_sample(("user", "what?"), ("assistant", " ")), "hold no tokens"),
        (_sample(("user", "what?")), "no assistant turn"),
        (_sample(("user", "what?"), ("assistant", "an <image>")), "take for an image"),
    ],
)
def test_what_no_prefix_and_suffix_say_is_refused(wrong: Sample, words: str) -> None:
    with pytest.raises(DataError, match=words):
        Collator.for_model(VLM)([SAMPLES[0], wrong])


def test_what_no_prefix_says_counts_as_bad_where_samples_are_read() -> None:
    talk = (("user", "a?"), ("assistant", "no"), ("user", "b?"), ("assistant", "no"))
    found = samples([*SAMPLES, _sample(*talk)], processor=VLM.processor, max_bad_fraction=0.4)
    assert (len(found), found.num_skipped) == (3, 1)

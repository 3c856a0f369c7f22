"""Trains the bundled models on the built-in scenes: `python -m interlace.bundled.train NAME`.

The whole recipe is here: online batches straight from the scene generator, AdamW with a cosine
schedule, a curriculum of captions and single-object questions first. It needs no GPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_model, save_model
from transformers import CLIPModel

from interlace._files import atomic_folder
from interlace.bundled import PREFIX, resolve
from interlace.bundled.build import build
from interlace.data.boards import (
    CELL_NAMES,
    COLOURS,
    CROWDED,
    DIGITS,
    NUM_OBJECTS,
    SHAPES,
    Scene,
    SceneImage,
    make_scene,
)
from interlace.data.collate import Collator
from interlace.data.questions import ask
from interlace.data.samples import IMAGE_PLACEHOLDER, Sample, Turn
from interlace.data.scenes import CAPTION_PROMPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

EASY_KINDS = ("colour", "shape", "digit")
# captions teach the easy kinds as well, so the others are asked more often
HARD_KINDS = ("count", "exist", "compare", "sum")
HARD_FRACTION = 0.7


@dataclass(frozen=True)
class Phase:
    """One stretch of training, with a fresh optimizer and its own schedule.

    Attributes:
        steps: optimiser steps.
        batch_size: scenes per step.
        learning_rate: peak of AdamW's learning rate, after `warmup_steps`.
        final_fraction: share of the peak that the cosine schedule ends at.
        weight_decay: of matrices; vectors have none.
        warmup_steps: steps of linear warm-up.
        easy_fraction: share of the steps, at the beginning, that ask about single objects only.
        caption_fraction: share of the scenes whose chat is a caption; the others are questions.
        questions: questions in one chat.
        list_fraction: share of the questions that ask to describe all objects of a colour, of a
            kind, or both.
        lists_last: put such lists at the end of the chat, where their answers give away nothing.
        hard_kinds: kinds of the other questions that need thought; one named twice is asked twice
            as often.
        num_objects: least and most objects of a scene.
    """

    steps: int
    batch_size: int
    learning_rate: float
    final_fraction: float = 0.02
    weight_decay: float = 0.05
    warmup_steps: int = 100
    easy_fraction: float = 0.0
    caption_fraction: float = 0.5
    questions: int = 4
    list_fraction: float = 0.0
    lists_last: bool = False
    hard_kinds: tuple[str, ...] = HARD_KINDS
    num_objects: tuple[int, int] = NUM_OBJECTS


PHASES = {
    "qwen3-vl": (
        # captions supervise every object at once, so seeing is learned from them
        Phase(1100, 64, 7e-4, final_fraction=0.5, easy_fraction=0.6),
        # an answer is one token, so what needs thought is learned from many questions
        Phase(2000, 48, 6e-4, warmup_steps=50, caption_fraction=0.15, questions=6),
        # a caption says what is where; to count, or to tell whether there is one, the model has to
        # find where something is, and a list teaches that object by object
        Phase(
            750, 48, 6e-4, warmup_steps=30, caption_fraction=0.08, questions=6, list_fraction=0.5
        ),
        Phase(
            620, 48, 6e-4, warmup_steps=30, caption_fraction=0.15, questions=6, list_fraction=0.35
        ),
        # asked first, before any other answer has told what there is
        Phase(
            1400,
            48,
            6e-4,
            warmup_steps=30,
            caption_fraction=0.1,
            questions=3,
            list_fraction=0.25,
            lists_last=True,
            hard_kinds=(*HARD_KINDS, "count", "exist"),
        ),
    ),
    "clip": (Phase(1200, 192, 7e-4, warmup_steps=150),),
    "blip": (Phase(3000, 64, 8e-4),),
    # a bundled model made ready for crowded scenes, which tell ways of pruning apart
    "qwen3-vl-crowded": (
        Phase(
            1100,
            48,
            5e-4,
            warmup_steps=30,
            caption_fraction=0.2,
            list_fraction=0.25,
            lists_last=True,
            hard_kinds=(*HARD_KINDS, "count", "exist"),
            num_objects=CROWDED,
        ),
    ),
    "blip-crowded": (Phase(1500, 64, 5e-4, num_objects=CROWDED),),
}


OBJECTIVES = {"qwen3-vl": "chat", "clip": "contrastive", "blip": "caption"}
# models that go on from a bundled one
STARTS = {"qwen3-vl-crowded": "qwen3-vl", "blip-crowded": "blip"}


def _list(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Ask to describe all objects of a colour, of a kind, or both; and the answer."""
    thing = rng.choice(scene.objects)
    colour, kind = thing.colour, thing.kind
    if rng.random() < 0.4:
        # perhaps something that is not there
        colour = rng.choice(tuple(COLOURS))
    elif rng.random() < 0.5:
        kind = rng.choice(DIGITS if thing.is_digit else SHAPES)
    wanted = rng.choice(("colour", "kind", "both"))
    words = {"colour": f"{colour} objects", "kind": kind, "both": f"{colour} {kind}"}[wanted]
    found = [
        f"a {each.name} at {CELL_NAMES[each.cell]}"
        for each in scene.objects
        if wanted == "kind" or each.colour == colour
        if wanted == "colour" or each.kind == kind
    ]
    return f"Describe the {words}.", ", ".join(found) or "no"


def _conversation(scene: Scene, rng: random.Random, phase: Phase, easy: bool) -> tuple[Turn, ...]:
    """Turns about a scene: one caption, or several questions."""
    if rng.random() < phase.caption_fraction:
        pairs = [(CAPTION_PROMPT, rng.choice(scene.captions()))]
    else:
        pairs, asked = [], 0
        for _ in range(phase.questions):
            if phase.list_fraction and rng.random() < phase.list_fraction:
                pairs.append(_list(scene, rng))
                asked += not phase.lists_last
                continue
            hard = not easy and rng.random() < HARD_FRACTION
            _, question, answer = ask(scene, rng, phase.hard_kinds if hard else EASY_KINDS)
            pairs.insert(asked, (question, answer))
            asked += 1
    turns: list[Turn] = []
    for question, answer in pairs:
        image = "" if turns else f"{IMAGE_PLACEHOLDER}\n"
        turns += [Turn("user", image + question), Turn("assistant", answer)]
    return tuple(turns)


def _sample(identity: str, rng: random.Random, phase: Phase, easy: bool) -> Sample:
    scene = make_scene(rng, "train", phase.num_objects)
    turns = _conversation(scene, rng, phase, easy)
    return Sample(identity, "chat", (SceneImage(scene),), turns, scene.captions())


def _rate(step: int, phase: Phase) -> float:
    """Learning-rate factor: linear warm-up, then cosine."""
    if step < phase.warmup_steps:
        return (step + 1) / phase.warmup_steps
    done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return phase.final_fraction + (1 - phase.final_fraction) * cosine


def _train_phase(
    model: PreTrainedModel, collator: Collator, phase: Phase, rng: random.Random, *, bf16: bool
) -> None:
    contrastive = {"return_loss": True} if isinstance(model, CLIPModel) else {}
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": phase.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=phase.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, phase))
    started, recent = time.monotonic(), []
    for step in range(phase.steps):
        easy = step < phase.steps * phase.easy_fraction
        scenes = range(step * phase.batch_size, (step + 1) * phase.batch_size)
        batch = collator([_sample(str(number), rng, phase, easy) for number in scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, **contrastive).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - started) / (step + 1)
            log.info(
                "step %d of %d: loss %.4f, %.2f s a step, %.0f min to go",
                step + 1,
                phase.steps,
                sum(recent) / len(recent),
                seconds,
                seconds * (phase.steps - step - 1) / 60,
            )
            recent = []


def train(
    name: str, output: Path, *, seed: int = 0, first_phase: int = 1, bf16: bool = True
) -> None:
    """Train one bundled model, or a bundled one further, and save it.

    Args:
        name: "qwen3-vl", "clip", "blip", "qwen3-vl-crowded" or "blip-crowded".
        output: folder for the bf16 safetensors checkpoint and the processor. The state after each
            phase is kept beside it, as `<output>.phase<n>.safetensors`.
        seed: of the initialisation and the scenes.
        first_phase: phase to start with, 1-based; later ones start from the kept state.
        bf16: run the forward pass under bf16 autocast.
    """
    kind = STARTS.get(name, name)
    model, processor = build(kind, seed=seed)
    if name in STARTS:
        load_model(model, Path(resolve(PREFIX + kind)) / "model.safetensors")
    log.info("%s: %.2f M parameters", name, sum(p.numel() for p in model.parameters()) / 1e6)
    collator = Collator(processor, OBJECTIVES[kind])
    # in bf16 on a CPU, the backward pass of fused attention is slower than writing attention out
    model.set_attn_implementation("eager")
    model.train()

    def state_file(phase: int) -> str:
        return f"{output}.phase{phase}.safetensors"

    if first_phase > 1:
        load_model(model, state_file(first_phase - 1))
    for number, phase in enumerate(PHASES[name], start=1):
        if number < first_phase:
            continue
        log.info("phase %d: %s", number, phase)
        _train_phase(model, collator, phase, random.Random(seed + number), bf16=bf16)
        save_model(model, state_file(number))
    with atomic_folder(output, overwrite=True) as folder:
        model.eval().to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PHASES))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--first-phase", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(
        arguments.name,
        arguments.output,
        seed=arguments.seed,
        first_phase=arguments.first_phase,
        bf16=not arguments.fp32,
    )


if __name__ == "__main__":
    main()

"""Runs that tests start in processes of their own; as a script it is `spread`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from heal.toys import heal_model, toy, toy_collate, toy_samples
from safetensors.torch import save_file

from interlace.heal import checkpoints, heal, optimizer_state
from interlace.heal.interpolation import interpolate
from interlace.heal.model import HealModel
from interlace.heal.shell import gathered, like_parameter, reshard
from interlace.heal.trainer import HealTrainer

if TYPE_CHECKING:
    from interlace.models import VLM


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _write_weights(vlm: VLM, result: Path) -> None:
    weights = {name: value.detach() for name, value in vlm.model.named_parameters()}
    save_file(weights, result.with_suffix(".safetensors"))


def _kill_at(step: int) -> None:
    plain = HealTrainer.training_step

    def training_step(self: HealTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            _die()
        return plain(self, *args, **kwargs)

    HealTrainer.training_step = training_step


def _kill_in_save(number: int) -> None:
    plain, saves = checkpoints.complete, []

    def complete(*args: Any) -> Path:
        saves.append(args)
        if len(saves) == number:
            _die()
        return plain(*args)

    checkpoints.complete = complete


def resumed(
    folder: Path, result: Path, kill_at: int | None = None, kill_in_save: int | None = None
) -> None:
    """Heal with checkpoints in `folder`, going on where they end; write the outcome to `result`.

    Args:
        folder: of the checkpoints.
        result: the weights go to `result`.safetensors, the losses to `result`.json.
        kill_at: kill the process before this step.
        kill_in_save: kill the process in this checkpoint, counted from 1, before it is complete.
    """
    if kill_at is not None:
        _kill_at(kill_at)
    if kill_in_save is not None:
        _kill_in_save(kill_in_save)
    name = "blip_caption"
    teacher, student = toy(name)
    # Dropout draws random numbers at every step, so their state must be restored as well.
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(12),
        validation_fraction=1 / 6,
        collate=toy_collate(name, teacher.model),
        output=folder,
        resume=folder.exists(),
        epochs=3.0,
        batch_size=2,
        accumulation=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=2,
    )
    _write_weights(student, result)
    facts = [report.steps, report.num_samples, report.tokens, report.losses, report.validation]
    result.with_suffix(".json").write_text(json.dumps(facts))


def _contrary() -> None:
    """Let this process find the worst point of healing's way the best."""
    plain = HealModel.forward

    def forward(self: HealModel, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        terms = plain(self, *args, **kwargs)
        return terms if self.training else {name: -value for name, value in terms.items()}

    HealModel.forward = forward


def spread(result: Path) -> None:
    """Heal as one of several processes (or alone) and write the outcome, as the first of them.

    A second process disagrees about how far to go, and writes beside `result`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        _contrary()
    folder = result.with_suffix(".run")
    teacher, student = toy("qwen3_vl", ("text", "vision"))
    report = heal(
        student,
        teacher=teacher,
        data=toy_samples(10),
        validation_fraction=0.2,
        collate=toy_collate("qwen3_vl", teacher.model),
        max_steps=4,
        save_steps=2,
        batch_size=4 // processes,
        accumulation=2,
        learning_rate=1e-2,
        output=folder,
        resume=(folder / "checkpoint-2").exists(),
    )
    if rank != "0":
        _write_weights(student, result.with_name(f"{result.name}-{rank}"))
    else:
        _write_weights(student, result)
        result.with_suffix(".json").write_text(report.to_json())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def uneven(result: Path) -> None:
    """Heal as one of several processes (or alone) where one sample alone has an image.

    Once both towers train, once the vision tower alone, once the text tower with random gates.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    runs: dict[tuple[str, ...], dict[str, Any]] = {
        ("text", "vision"): {},
        ("vision",): {},
        ("text",): {"gates": "hard_concrete"},
    }
    for towers, settings in runs.items():
        teacher, student = toy("llava", towers)
        batches = toy_collate("llava", teacher.model)
        image = teacher.family.image_token_id(teacher.model)

        def collate(samples: Any, batches: Any = batches, image: Any = image) -> dict[str, Any]:
            batch = batches(samples)
            pictured = torch.tensor([sample.id == "0" for sample in samples])
            gone = (batch["input_ids"] == image) & ~pictured[:, None]
            batch["input_ids"] = batch["input_ids"].masked_fill(gone, 5)
            pixels = batch.pop("pixel_values")[pictured]
            return {**batch, "pixel_values": pixels} if len(pixels) else batch

        report = heal(
            student,
            teacher=teacher,
            data=toy_samples(4),
            collate=collate,
            batch_size=4 // processes,
            epochs=2.0,
            learning_rate=1e-3,
            **settings,
        )
        if os.environ.get("RANK", "0") == "0":
            named = result.with_name(f"{result.name}-{'-'.join(towers)}")
            _write_weights(student, named)
            named.with_suffix(".json").write_text(report.to_json())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def sharded(folder: Path) -> None:
    """Compute gradients on one of two processes, sharded by accelerate's FSDP2, and write them.

    accelerate itself shards on GPUs only, so its function is called with what it reads.
    """
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    teacher, student = toy("qwen3_vl")
    model = heal_model(student, teacher, chunk_tokens=3, gates="l1")
    collate = toy_collate("qwen3_vl", teacher.model)
    samples = toy_samples(4)
    counts = model.count([collate(samples)])
    # gathered weights are kept after a forward pass, which is when they can be stale
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        reshard_after_forward=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh=None,
        parallelism_config=None,
        mixed_precision="no",
        is_main_process=rank == 0,
        device=torch.device("cpu"),
    )
    fsdp2_prepare_model(accelerator, model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = gathered(trained.items(), keep=True)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    # The second pass finds the sharded weights as the first one left them.
    for _ in range(2):
        optimizer.zero_grad()
        terms = model(counts=counts, **collate(samples[2 * rank : 2 * rank + 2]))
        (2 * terms["loss"]).backward()
        gradients = gathered(((n, p.grad) for n, p in trained.items()), keep=rank == 0)
        optimizer.step()
    stored = optimizer_state.tensors_of(optimizer, trained, keep=True)
    weights = gathered(trained.items(), keep=True)
    fresh = torch.optim.AdamW(trained.values(), lr=1e-2)
    optimizer_state.load(fresh, trained, stored)
    again = optimizer_state.tensors_of(fresh, trained, keep=True)
    same = all(torch.equal(value, again[name]) for name, value in stored.items())
    for name, parameter in trained.items():
        part = like_parameter(weights[name], parameter).to_local()
        same = same and torch.equal(part, parameter.to_local())
    half_way, losses = _half_way(model, trained, start, collate(samples))
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
        save_file(weights, folder / "weights.safetensors")
        save_file({**half_way, "losses": losses}, folder / "half_way.safetensors")
    torch.distributed.destroy_process_group()
    sys.exit(0 if same and again.keys() == stored.keys() else 1)


def _half_way(
    model: HealModel,
    trained: dict[str, torch.nn.Parameter],
    start: dict[str, torch.Tensor],
    batch: dict[str, Any],
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Go back to the middle, and return the weights there and the losses of all points."""
    losses = []

    def validate() -> dict[str, float]:
        losses.append(model(**batch)["loss"].item())
        reshard(model)
        return {"loss": abs(len(losses) - 3)}

    assert interpolate(trained, start.__getitem__, validate)[0]["share"] == 0.5
    return gathered(trained.items(), keep=True), torch.tensor(losses)


def whole(folder: Path) -> None:
    """The same as `sharded` on one process, without sharding."""
    teacher, student = toy("qwen3_vl")
    model = heal_model(student, teacher, gates="l1")
    batch = toy_collate("qwen3_vl", teacher.model)(toy_samples(4))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        gradients = {name: parameter.grad for name, parameter in trained.items()}
        optimizer.step()
    save_file(gradients, folder / "gradients.safetensors")
    save_file({n: p.detach() for n, p in trained.items()}, folder / "weights.safetensors")
    half_way, losses = _half_way(model, trained, start, batch)
    save_file({**half_way, "losses": losses}, folder / "half_way.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    spread(Path(sys.argv[1]))

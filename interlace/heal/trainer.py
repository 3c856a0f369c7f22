"""The training loop: transformers.Trainer with our loss, our order of samples and our checkpoints.

Legend: none; tensors are handled in model.py.

Everything that accelerate wraps around a module works as in any Trainer run: torchrun and
accelerate launch (DistributedDataParallel), FSDP2, DeepSpeed ZeRO 1 and 2, bfloat16.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from interlace.errors import CheckpointError, ConfigError, DataError
from interlace.heal import checkpoints, optimizer_state
from interlace.heal.batches import COUNTED
from interlace.heal.interpolation import interpolate
from interlace.heal.model import TERMS, HealModel, mean_terms
from interlace.heal.shell import full_value, gathered, like_parameter, reshard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.utils.data import Dataset, Sampler
    from transformers import TrainingArguments

    from interlace._progress import Advance
    from interlace.data.samples import Sample

KEPT_CHECKPOINTS = 2
TRAINER_STATE = "trainer_state.json"


class _Pace(TrainerCallback):  # type: ignore[misc]
    """Shows progress, and logs whenever a checkpoint is due so that no loss is lost between two."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        last = state.log_history[-1] if state.log_history else {}
        note = f"loss {last['loss']:.4f}" if "loss" in last else ""
        if state.is_world_process_zero:
            self._advance(1, note)
        over = state.global_step >= state.max_steps
        saving = args.save_strategy != "no"
        control.should_save = saving and (control.should_save or over)
        control.should_log = control.should_log or control.should_save or over
        return control


class HealTrainer(Trainer):  # type: ignore[misc]
    """Trainer of a HealModel.

    Attributes:
        progress: running sums over the whole run, resumed parts included: "seconds", "tokens",
            "num_samples".
    """

    def __init__(
        self,
        model: HealModel,
        args: TrainingArguments,
        *,
        dataset: Dataset[Sample],
        collate: Callable[[Sequence[Sample]], dict[str, Tensor]],
        identity: dict[str, Any],
        advance: Advance,
    ) -> None:
        """Prepare the run.

        Args:
            model: the student in training; exactly its trainable parameters require a gradient.
            args: from `training_arguments`.
            dataset: read front to back, once.
            collate: samples -> batch on the CPU.
            identity: fingerprints of the run, kept in its checkpoints.
            advance: called after every step.

        Raises:
            ConfigError: a way of sharding that healing does not support.
        """
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Pace(advance))
        self.healed = model
        # Read by the Trainer: compute_loss normalises over the accumulated batch itself.
        self.loss_is_scaled_for_ga = True
        self.progress = {"seconds": 0.0, "tokens": 0.0, "num_samples": 0.0}
        self._identity = identity
        self._counts: dict[str, float] = {}
        self._sums: Tensor | None = None
        self._present: list[str] = []
        self._logged_step = 0
        self._clock = time.monotonic()
        self._check_wrapping()

    def _check_wrapping(self) -> None:
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and getattr(fsdp, "fsdp_version", 1) != 2:
            raise ConfigError(
                "Healing shards with FSDP version 2 only, version 1 is configured. Set "
                "fsdp_version to 2 in the accelerate config, or FSDP_VERSION=2."
            )
        if not self.is_deepspeed_enabled:
            return
        stage = getattr(self.accelerator.state.deepspeed_plugin, "zero_stage", 0)
        if stage == 3:
            raise ConfigError(
                "Healing does not run under DeepSpeed ZeRO stage 3, which takes weights away "
                "between the passes of student and teacher. Use stage 1 or 2, or FSDP2."
            )
        if self.args.save_strategy != "no":
            raise ConfigError(
                "Under DeepSpeed healing writes no checkpoints: DeepSpeed's are pickles, which "
                "this package does not load. Leave out the output folder, or use FSDP2."
            )

    def check_samples(self, samples: Sequence[Sample]) -> None:
        """Refuse samples of which only some have images where layers are sharded.

        Raises:
            ConfigError: a process whose batch has no image would wait for the others for ever, as
                they gather the layers that it leaves out.
        """
        pictured = sum(bool(sample.images) for sample in samples)
        sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        if sharded and 0 < pictured < len(samples):
            raise ConfigError(
                f"Under FSDP2 all processes have to run the same layers, but {pictured} of "
                f"{len(samples)} samples have images and the others have none. Heal on samples of "
                "one kind, or without sharding."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; gates are apart in it, with a learning rate of their own."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        gates = self.healed.gates
        if gates is None:
            return optimizer
        # The wrapped module holds the parameters that train, the gates under an unchanged name.
        trained = self._trained()["gates.values"]
        for group in optimizer.param_groups:
            group["params"] = [each for each in group["params"] if each is not trained]
        rate = self.healed.settings.gate_learning_rate
        optimizer.add_param_group({"params": [trained], "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _get_train_sampler(
        self, train_dataset: Dataset[Sample] | None = None
    ) -> Sampler[int] | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Fetch the batches of one optimiser step and count what the loss is averaged over."""
        batches: list[Any] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        self._counts = self._summed(self.healed.count(batches))
        self.progress["tokens"] += self._counts.get("tokens", 0.0)
        self.progress["num_samples"] += self._counts.get("samples", 0.0)
        # Anything but None tells the Trainer that the loss needs no further division.
        return batches, int(self._counts.get("samples", 0.0))

    def _summed(self, own: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return own
        row = torch.tensor([own.get(key, 0.0) for key in COUNTED], device=self.args.device)
        # fp32 is exact up to 16 million tokens per optimiser step.
        total: Any = self.accelerator.reduce(row, reduction="sum")
        return dict(zip(COUNTED, total.tolist(), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Compute a batch's share of the loss of the optimiser step.

        Raises:
            DataError: the loss is not finite.
        """
        terms = model(counts=self._counts, **inputs)
        loss = terms["loss"]
        if not torch.isfinite(loss.detach()).item():
            values = ", ".join(f"{name} {terms[name].item():g}" for name in TERMS if name in terms)
            raise DataError(
                f"The loss is not finite at step {self.state.global_step + 1} ({values}). The "
                "student is left as it was. Lower learning_rate, or look for damaged samples and "
                "for activations that overflow."
            )
        absent = torch.zeros_like(loss.detach())
        shares = torch.stack([terms.get(name, absent).detach().float() for name in TERMS])
        self._sums = shares if self._sums is None else self._sums + shares
        self._present = [name for name in TERMS if name in terms]
        # Gradients are averaged over processes, shares have to be summed.
        scaled = loss * self.accelerator.num_processes
        return (scaled, terms) if return_outputs else scaled

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the mean of every term over the steps since the last time."""
        if "loss" in logs and self._sums is not None:
            sums: Any = self.accelerator.reduce(self._sums, reduction="sum")
            steps = max(1, self.state.global_step - self._logged_step)
            means = (sums / steps).tolist()
            named = dict(zip(TERMS, means, strict=True))
            logs = {**logs, **{name: named[name] for name in self._present}}
            self._sums = None
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    def losses(self) -> tuple[dict[str, Any], ...]:
        """Return what was logged: "step", the terms, "learning_rate" and "grad_norm"."""
        kept = ("step", *TERMS, "learning_rate", "grad_norm")
        return tuple(
            {key: entry[key] for key in kept if key in entry}
            for entry in self.state.log_history
            if "loss" in entry
        )

    def interpolate(
        self, start: Callable[[str], Tensor], samples: Sequence[Sample]
    ) -> tuple[dict[str, float], ...]:
        """Go back to the best point between start and end, as `interpolation.interpolate` does.

        Args:
            start: gives the whole tensor that a trained parameter had before training.
            samples: not trained on; every process looks at all of them.
        """
        # batches are made anew for every point: their images need not stay in memory
        batches: DataLoader[dict[str, Tensor]] = DataLoader(
            samples,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        said: list[Tensor | None] = []
        counts = self.healed.count(self._heard(batches, said))
        self.model_wrapped.eval()
        return interpolate(self._trained(), start, lambda: self._validated(batches, counts, said))

    def _heard(
        self, batches: Iterable[dict[str, Tensor]], said: list[Tensor | None]
    ) -> Iterator[dict[str, Tensor]]:
        """Hand batches on, and keep what the teacher says to each."""
        for batch in batches:
            told = None
            if self.healed.has_teacher:
                told = self.healed.of_teacher(self._prepare_inputs(batch)).cpu()
            said.append(told)
            yield batch

    def _validated(
        self,
        batches: Iterable[dict[str, Tensor]],
        counts: dict[str, float],
        said: Sequence[Tensor | None],
    ) -> dict[str, float]:
        """Return the losses of the predictions as the weights are, and their weighted sum."""
        settings = self.healed.settings
        weights = {"ce": settings.ce_weight, "kl": settings.kl_weight}
        means = mean_terms(self.model_wrapped, map(self._prepare_inputs, batches), counts, said)
        reshard(self.model_wrapped)
        losses = {name: means[name] for name in weights if name in means}
        losses["loss"] = sum(weights[name] * value for name, value in losses.items())
        # one process decides: by a rounding error others could stop at another point
        agreed: list[dict[str, float]] = broadcast_object_list([losses])
        return agreed[0]

    def _trained(self) -> dict[str, nn.Parameter]:
        module = self.accelerator.unwrap_model(self.model_wrapped)
        return {
            name.removeprefix("student."): parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def check_weights(self) -> None:
        """Refuse weights that the last step spoiled; those of others show in the next loss.

        Raises:
            DataError: a trained weight is not finite.
        """
        for name, parameter in self._trained().items():
            if not bool(full_value(parameter).isfinite().all()):
                raise DataError(
                    f"{name} is not finite after the last step, {self.state.global_step}: its "
                    "gradients were not. The student is left as it was. Lower learning_rate, or "
                    "look for damaged samples and for activations that overflow."
                )

    def trained_values(self) -> Callable[[str], Tensor]:
        """Return a function that gives the whole trained tensor of a name in the student."""
        parameters = self._trained()
        return lambda name: full_value(parameters[name])

    def tick(self) -> None:
        """Bring the seconds of `progress` up to date."""
        now = time.monotonic()
        self.progress["seconds"] += now - self._clock
        self._clock = now

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        self.tick()
        trained = self._trained()
        with checkpoints.worded_errors(output, step):
            if self.args.should_save:
                checkpoints.begin(output, step)
            self.accelerator.wait_for_everyone()
            part = checkpoints.part_of(output, step)
            keep = self.args.should_save
            weights = gathered(trained.items(), keep=keep)
            tensors = optimizer_state.tensors_of(self.optimizer, trained, keep=keep)
            rng = part / f"rng-{self.args.process_index}.json"
            rng.write_text(json.dumps(checkpoints.rng_state()), encoding="utf-8")
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.write_tensors(part / checkpoints.WEIGHTS, weights)
                checkpoints.write_tensors(part / checkpoints.OPTIMIZER, tensors)
                self.state.save_to_json(str(part / TRAINER_STATE))
                manifest = checkpoints.Manifest(
                    step=step,
                    identity=self._identity,
                    progress=self.progress,
                    scheduler=optimizer_state.schedule_of(self.lr_scheduler),
                )
                checkpoints.complete(output, step, manifest)
                checkpoints.rotate(output, KEPT_CHECKPOINTS)
            self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        weights = checkpoints.read_tensors(Path(resume_from_checkpoint) / checkpoints.WEIGHTS)
        trained = self._trained()
        if sorted(weights) != sorted(trained):
            raise CheckpointError(
                f"{resume_from_checkpoint} holds {len(weights)} trained parameters, the student "
                f"has {len(trained)} of other names. Resume with the student the run was started "
                "with."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                value = weights[name].to(parameter.dtype)
                parameter.copy_(like_parameter(value, parameter))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        manifest = checkpoints.read(folder)
        self.progress = dict(manifest.progress)
        self._logged_step = manifest.step
        trained = self._trained()
        optimizer_state.load(
            self.optimizer, trained, checkpoints.read_tensors(folder / checkpoints.OPTIMIZER)
        )
        optimizer_state.load_schedule(self.optimizer, self.lr_scheduler, manifest.scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Do nothing: bfloat16 needs no gradient scaler."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"rng-{self.args.process_index}.json"
        checkpoints.set_rng_state(json.loads(path.read_text(encoding="utf-8")))

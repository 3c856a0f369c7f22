"""Writing a model out: a checkpoint with manifest, records and card, verified or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from interlace._files import atomic_folder, check_new_checkpoint, is_disk_full
from interlace.errors import CheckpointError, ConfigError
from interlace.export.card import model_card
from interlace.export.verify import verify_checkpoint
from interlace.models.checkpoint import MANIFEST
from interlace.models.handle import check_vlm
from interlace.models.widths import PER_LAYER, per_layer_settings, with_widths
from interlace.records import Plan, PruneRecord, Record

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

    from interlace.models.handle import VLM


# What a record may name as made from, that ties it to a model.
_LINKS = ("model", "student", "teacher", "baseline", "plan", "scores")


def export(
    vlm: VLM,
    folder: str | os.PathLike[str],
    *,
    records: Record | Iterable[Record | None] = (),
    overwrite: bool = False,
    verify: bool = True,
    inputs: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a model as a transformers checkpoint, with what is known about it.

    It is a standard one, which anything reads that reads the original architecture, unless the
    student has run-time bridges or layers with widths that no config can state
    (`vlm.record.standard` is False): then only `open_model` builds it. Such weights lie in the
    checkpoint too, and the config states such widths where its class takes them
    (`per_layer_config`). The model card says which of the two it is.

    The folder holds config, weights (safetensors), generation settings, the processor where there
    is one, `interlace.json` (the manifest of the cut), one JSON file per record and a model card.
    It appears under its name only when it is complete and verified.

    Args:
        vlm: the model; a student with its plan and manifest, or any other model.
        folder: where to write; must not exist, unless `overwrite`.
        records: a record to put beside it, or several in any order; None entries are skipped. The
            plan of the student is added.
        overwrite: replace an existing checkpoint, once the new one is complete.
        verify: reload the folder in a fresh process, a standard one with transformers alone, and
            compare outputs.
        inputs: forward inputs to compare on; default: synthetic ones.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, or is no checkpoint to be replaced; a record is none, or of
            another cut or model; weights that are no tensors (quantised by torch), or lie elsewhere
            than in a model of this class (adapters that are not merged).
        CheckpointError: the disk is full, the folder cannot be written, or the checkpoint failed
            its verification. Nothing is left behind.
    """
    check_vlm(vlm, "model")
    if isinstance(records, Record) or not isinstance(records, Iterable):
        records = (records,)
    _check_weights(vlm)
    _check_names(vlm)
    target = check_new_checkpoint(folder, overwrite=overwrite)
    named = _file_names(_complete(vlm, records))
    try:
        with atomic_folder(target, overwrite=overwrite) as made:
            _save(vlm, made)
            if vlm.record is not None:
                vlm.record.save(made / MANIFEST)
            for name, record in named.items():
                record.save(made / name)
            proof = verify_checkpoint(vlm, made, inputs=inputs) if verify else None
            card = model_card(vlm, tuple(named.values()), verification=proof)
            (made / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write the checkpoint {target} ({error.strerror or error}). Check the path and "
            "its permissions."
        ) from error
    return target


def _complete(vlm: VLM, records: Iterable[Record | None]) -> list[Record]:
    """Check the given records and add the student's plan."""
    given = [record for record in records if record is not None]
    for record in given:
        if not isinstance(record, Record):
            raise ConfigError(
                "records takes Scores, Plan, HealReport and EvalReport records, got "
                f"{type(record).__name__}."
            )
    plans = [record for record in given if isinstance(record, Plan)]
    if vlm.record is not None and plans:
        wanted = {vlm.record.plan_fingerprint}
        wanted |= {vlm.plan.fingerprint} if vlm.plan is not None else set()
        if not wanted & {plan.fingerprint for plan in plans}:
            raise ConfigError(
                "The plan among the records is not the one that the model was pruned by "
                f"(fingerprint {vlm.record.plan_fingerprint[:12]}...). Give that plan, or none: "
                "the student knows its own."
            )
    elif vlm.plan is not None and not plans:
        given.insert(0, vlm.plan)
    if any(isinstance(record, PruneRecord) and record != vlm.record for record in given):
        raise ConfigError(
            "The manifest among the records is of another cut. Leave it out: it is written from "
            "the model itself."
        )
    _check_same_model(vlm, given)
    return [record for record in given if not isinstance(record, PruneRecord)]


def _check_same_model(vlm: VLM, records: Iterable[Record]) -> None:
    """Refuse records that name models, none of which this one was made from.

    A record may name this model, the one before the cut, or what another record here is linked to
    (measurements before healing name a student that only the report of healing knows). Records that
    name no model are taken on trust.
    """
    known = {vlm.fingerprint}
    if vlm.record is not None:
        known |= {vlm.record.inputs.get(name, "") for name in _LINKS}
    named = {
        name: {record.inputs[key] for key in _LINKS if key in record.inputs}
        for name, record in _file_names(records).items()
    }
    waiting = {name: prints for name, prints in named.items() if prints}
    while linked := [name for name, prints in waiting.items() if prints & known]:
        for name in linked:
            known |= waiting.pop(name)
    if waiting:
        raise ConfigError(
            f"The records for {', '.join(sorted(waiting))} are of another model: none of the "
            f"fingerprints they name belongs to {vlm.name} or to the model it was cut from. "
            "Leave them out."
        )


def _file_names(records: Iterable[Record]) -> dict[str, Record]:
    """Name each record's file after its kind; the second of a kind is numbered 2."""
    named: dict[str, Record] = {}
    for record in records:
        number = sum(1 for other in named.values() if other.kind == record.kind) + 1
        named[f"{record.kind}{'' if number == 1 else f'_{number}'}.json"] = record
    return named


def _check_weights(vlm: VLM) -> None:
    """Refuse weights that are no tensors."""
    for name, value in vlm.model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ConfigError(
                f"{vlm.name or type(vlm.model).__name__} cannot be written as a checkpoint: "
                f"{name} is a {type(value).__name__}, not a tensor, as torch's own quantisation "
                "leaves it. Export the model as it was before, and quantise what is loaded."
            )


def _check_names(vlm: VLM) -> None:
    """Refuse a model in which something else stands in the place of a layer of its class."""
    model: Any = vlm.model
    if getattr(model, "hf_quantizer", None) is not None:
        # transformers puts layers of another kind into such models, and again when it loads them
        return
    built: Any = type(model)
    if vlm.record is not None and vlm.record.widths:
        built = with_widths(built, vlm.record)
    with torch.device("meta"):
        names = built(copy.deepcopy(model.config)).state_dict().keys()
    missing = sorted(names - model.state_dict().keys())
    if missing:
        place, _, weight = missing[0].rpartition(".")
        stands = dict(model.named_modules()).get(place)
        raise ConfigError(
            f"{vlm.name} cannot be written as a checkpoint: it lacks {len(missing)} weights of a "
            f"{type(model).__name__}, such as '{weight}' of {place or 'the model'}, where "
            f"{'nothing stands' if stands is None else f'a {type(stands).__name__} stands'}. Merge "
            "adapters into the weights (merge_and_unload of peft) or take them out, and export "
            "again."
        )


def _save(vlm: VLM, folder: Path) -> None:
    try:
        vlm.model.save_pretrained(folder)
        if vlm.processor is not None:
            vlm.processor.save_pretrained(folder)
    except (SafetensorError, RuntimeError, ValueError) as error:
        if is_disk_full(error):
            # worded by the folder's own context, which knows the final name
            raise
        words = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot save {type(vlm.model).__name__} ({type(error).__name__}: "
            f"{words}). Check the model's weights and its generation settings."
        ) from error
    _note_widths(vlm, folder / "config.json")


def _note_widths(vlm: VLM, path: Path) -> None:
    """Add the widths of single layers to the config of a checkpoint that has such.

    `open_model` goes by the manifest, so a config that cannot hold them is left as it is.
    """
    settings = per_layer_settings(vlm)
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for place, layers in settings.items():
        noted = copy.deepcopy(config)
        part = noted
        for key in filter(None, place.split(".")):
            part = part[key]
        part[PER_LAYER] = layers
        if _is_readable(type(vlm.model.config), noted):
            config = noted
    if settings:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_readable(config_class: type[PreTrainedConfig], config: dict[str, Any]) -> bool:
    """Tell whether a config class takes what a file would hold.

    Those that compare the number of heads with the width (CLIP, Llama) refuse widths of layers.
    """
    try:
        config_class.from_dict(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 (the validators of config classes raise what they like)
        return False
    return True

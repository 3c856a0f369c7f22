"""What is special about a family of models, as data: names, pinned layers, maps of indices.

Towers are found generically (see discovery.py). A family adds only what the module tree cannot
tell: which class means which objective, which layers something else refers to by number, and how
those numbers change when layers go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from interlace.errors import FamilyError, PlanError, unknown_name
from interlace.models.discovery import PER_LAYER_KEYS, DepthField, Stack, find_towers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel

Objective = Literal["chat", "contrastive", "caption", "vqa"]
# Dotted config key -> (before, after).
Changes = dict[str, tuple[Any, Any]]


class Pins(Protocol):
    """Layers of a tower that something refers to: position in this model -> reason in words."""

    def __call__(self, model: PreTrainedModel, tower_name: str) -> dict[int, str]:
        """Return the layers; empty where the tower has none."""


@dataclass(frozen=True)
class Shortened:
    """One tower after its layers were taken out, for the family to bring its index maps in line.

    Attributes:
        model: the student; its module list and depth fields are already cut. Only this object may
            be changed.
        tower_name: the tower that was cut.
        kept: positions, in the model before the cut, of the layers that stayed; ascending.
        layers: the modules before the cut, for what a removed layer held for all; not to be
            changed.
    """

    model: PreTrainedModel
    tower_name: str
    kept: tuple[int, ...]
    layers: Sequence[nn.Module]

    @property
    def num_layers(self) -> int:
        """Depth before the cut."""
        return len(self.layers)

    def below(self, position: int) -> int:
        """How many kept layers stand below `position`, a position before the cut."""
        return sum(1 for kept in self.kept if kept < position)

    def renumber(self, key: str, before: list[int], after: list[int]) -> Changes:
        """Write new layer numbers into the vision config and every module that keeps a copy."""
        if after == before:
            return {}
        config: Any = self.model.config
        setattr(config.vision_config, key, after)
        for module in self.model.modules():
            if key in vars(module):
                setattr(module, key, list(after))
        return {f"vision_config.{key}": (before, after)}


class PerImage(Protocol):
    """Tells how much of what the vision tower is given belongs to every image of a batch."""

    def __call__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return how many rows or patches, [images]; None where it does not apply."""


class Remap(Protocol):
    """Brings a family's index maps in line with a cut and returns the config keys it changed."""

    def __call__(self, cut: Shortened) -> Changes:
        """Change `cut.model` and its config in place.

        Raises:
            PlanError: the family cannot express the cut, in words.
        """


def no_pins(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
    """Pin nothing."""
    return {}


def no_tiles(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Let every image be a row."""
    return None


def no_remap(cut: Shortened) -> Changes:
    """Change nothing."""
    return {}


def token_id(model: PreTrainedModel, kind: str) -> int | None:
    """The token id that stands for the features of an "image" or a "video"; None without one."""
    for key in (f"{kind}_token_id", f"{kind}_token_index"):
        value = getattr(model.config, key, None)
        if isinstance(value, int):
            return value
    return None


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the family's name, as in `Family 'qwen3_vl'`.
        model_types: values of `config.model_type` it covers.
        objective: what its models are trained for: "chat", "contrastive", "caption" or "vqa".
        architectures: model classes it covers; the first one is built where a checkpoint names
            none.
        bidirectional: towers whose tokens see later ones too.
        shared_depth: groups of towers whose depth is one config field, so that they must stay
            equally deep.
        bound: layers that other parts read from or write to by number; dropping one must be asked
            for.
        advised: further layers that are better kept; dropping them is allowed.
        unread: layers whose output nothing reads, so that they may go for free.
        remapping: what else must change when layers of a tower go.
        tiles: into how many rows of the vision tower every image of a batch is cut, [images]; None
            where an image is a row. Where a batch does not say which image a row is of, all
            images of a sample are one.
        patches: how many patches every image of a batch has where the vision tower is given all of
            them in one row, [images], and the batch holds no grids; None where every image is a
            row.
    """

    name: str
    model_types: tuple[str, ...]
    objective: Objective
    architectures: tuple[str, ...] = ()
    bidirectional: tuple[str, ...] = ("vision", "qformer", "text_encoder")
    shared_depth: tuple[tuple[str, ...], ...] = ()
    bound: Pins = no_pins
    advised: Pins = no_pins
    unread: Pins = no_pins
    remapping: Remap = no_remap
    tiles: PerImage = no_tiles
    patches: PerImage = no_tiles

    def stacks(self, model: PreTrainedModel) -> dict[str, Stack]:
        """Find the towers of a model of this family.

        Raises:
            FamilyError: a tower's depth is not the one its config states.
        """
        return find_towers(model)

    def pinned(self, model: PreTrainedModel, tower_name: str) -> dict[int, str]:
        """Layers that protection keeps: position in this model -> reason.

        These are the bound and the advised ones, and the last layer, whose output the final norm
        and head were trained on, unless nothing reads it.
        """
        last = len(self.stack(model, tower_name).layers) - 1
        unread = self.unread(model, tower_name)
        pins = (
            {} if last in unread else {last: "last layer: the final norm and head read its output"}
        )
        pins |= self.advised(model, tower_name) | self.bound(model, tower_name)
        return dict(sorted(pins.items()))

    def stack(self, model: PreTrainedModel, tower_name: str) -> Stack:
        """Find one tower by name.

        Raises:
            FamilyError: the model has no such tower.
        """
        stacks = self.stacks(model)
        if tower_name not in stacks:
            raise FamilyError(unknown_name(f"tower of {type(model).__name__}", tower_name, stacks))
        return stacks[tower_name]

    def depth_fields(self, model: PreTrainedModel, tower_name: str) -> tuple[DepthField, ...]:
        """Every config field that holds a tower's depth, copies inside the model included."""
        return self.stack(model, tower_name).depth_fields

    def per_layer_lists(self, model: PreTrainedModel, tower_name: str) -> tuple[DepthField, ...]:
        """Every config list with one entry per layer of a tower, to be cut with its layers."""
        stack = self.stack(model, tower_name)
        return tuple(
            DepthField(field.config, key, field.path.removesuffix(field.key) + key)
            for field in {id(field.config): field for field in stack.depth_fields}.values()
            for key in PER_LAYER_KEYS
            if isinstance(getattr(field.config, key, None), (list, tuple))
            and len(getattr(field.config, key)) == len(stack.layers)
        )

    def check_depths(self, depths: Mapping[str, int]) -> None:
        """Refuse depths that one shared config field cannot hold.

        Args:
            depths: tower name -> number of layers after the cut, for every tower of the model.

        Raises:
            PlanError: towers that share a depth field would differ in depth.
        """
        for group in self.shared_depth:
            found = {name: depths[name] for name in group if name in depths}
            if len(set(found.values())) > 1:
                stated = ", ".join(f"{name} {depth}" for name, depth in found.items())
                raise PlanError(
                    f"Family '{self.name}' states the depth of {' and '.join(found)} in one config "
                    f"field, but the plan leaves them with different depths ({stated}). Drop the "
                    "same number of layers from each."
                )

    def remap(
        self,
        model: PreTrainedModel,
        tower_name: str,
        kept: tuple[int, ...],
        layers: Sequence[nn.Module],
    ) -> Changes:
        """Bring the family's index maps in line after the layers of one tower were cut.

        To be called once per cut tower, in any order, after the module list and the depth fields
        were cut.

        Args:
            model: the student, changed in place with its config.
            tower_name: the tower that was cut.
            kept: positions of the kept layers before the cut, ascending.
            layers: the tower's modules before the cut.

        Returns:
            Dotted config key -> (before, after) of what changed.

        Raises:
            PlanError: the family cannot express the cut.
        """
        return self.remapping(Shortened(model, tower_name, kept, layers))

    def image_token_id(self, model: PreTrainedModel) -> int | None:
        """The token id that stands for an image's features in `input_ids`; None without one."""
        return token_id(model, "image")

    def video_token_id(self, model: PreTrainedModel) -> int | None:
        """The token id that stands for a video's features in `input_ids`; None without one."""
        return token_id(model, "video")

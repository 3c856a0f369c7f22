"""Text layers of several kinds, named in `layer_types`, of which one of a kind has to stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interlace.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from interlace.models.family import Changes, Pins, Remap, Shortened


def _kinds(model: PreTrainedModel) -> list[str]:
    config: Any = model.config
    return list(config.text_config.layer_types)


def last_of(*kinds: str) -> Pins:
    """Advise to keep a text layer that is the only one of its kind."""

    def advised(model: PreTrainedModel, tower_name: str) -> dict[int, str]:
        found = _kinds(model) if tower_name == "text" else []
        return {
            found.index(kind): f"the only text layer with {kind}"
            for kind in kinds
            if found.count(kind) == 1
        }

    return advised


def keep_one_of(*kinds: str) -> Remap:
    """Refuse cuts that leave no text layer of a kind; a model cannot be built or run without."""

    def remap(cut: Shortened) -> Changes:
        left = _kinds(cut.model) if cut.tower_name == "text" else kinds
        for kind in kinds:
            if kind not in left:
                raise PlanError(
                    f"The plan leaves no text layer with {kind}, which {type(cut.model).__name__} "
                    "needs. Keep one of them."
                )
        return {}

    return remap

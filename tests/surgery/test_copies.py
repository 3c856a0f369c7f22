"""Students that no config states are copied and saved whole, as any module of torch is."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny import TINY, tiny_inputs

from interlace.export import export
from interlace.models import VLM, family_of, open_model
from interlace.records import Plan, TowerPlan
from interlace.surgery import prune

if TYPE_CHECKING:
    from pathlib import Path


def _unstated(name: str, kind: str) -> VLM:
    """A student that lacks units or parts in every tower, or has bridges."""
    model = TINY[name]()
    vlm = VLM(model, family_of(model), name=name)
    towers = {}
    for tower, shape in vlm.shape().towers.items():
        own = next(n for n, site in shape.sites.items() if site.kind == "heads" and not site.cross)
        towers[tower] = {
            "units": TowerPlan(shape.num_layers, cut={own: {2: (1,)}}),
            "parts": TowerPlan(shape.num_layers, parts={own: (2,)}),
            "bridges": TowerPlan(shape.num_layers, drop=(2,)),
        }[kind]
    if kind == "bridges":
        data = [tiny_inputs(name, model, batch=4)]
        return prune(vlm, Plan(towers), bridges="lowrank", data=data, rank=2)
    return prune(vlm, Plan(towers, standard=False))


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**inputs)
    return [v for v in output.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]


@pytest.mark.parametrize("kind", ["units", "parts", "bridges"])
@pytest.mark.parametrize("name", ["blip_caption", "clip"])
def test_students_are_saved_and_copied_whole(name: str, kind: str, tmp_path: Path) -> None:
    student = _unstated(name, kind)
    inputs = tiny_inputs(name, student.model)
    opened = open_model(export(student, tmp_path / "out", verify=False))
    wanted = _outputs(student.model, inputs)
    for model in (student.model, opened.model):
        assert type(model) is type(TINY[name]())
        for made in (_saved(model), copy.deepcopy(model), _saved(copy.deepcopy(model))):
            names = [type(module).__name__ for module in made.modules()]
            assert names == [type(module).__name__ for module in model.modules()]
            assert all(map(torch.equal, _outputs(made, inputs), wanted))
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.zero_()
            assert all(map(torch.equal, _outputs(model, inputs), wanted))

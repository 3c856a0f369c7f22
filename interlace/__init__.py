"""INTERLACE makes vision-language models smaller and faster by removing whole layers.

    import interlace as il

    vlm     = il.open_model("Qwen/Qwen3-VL-8B-Instruct")
    calib   = il.samples("finevision.json", count=256, seed=0)
    scores  = il.score(vlm, calib)
    plan    = il.make_plan(scores, drop_fraction=0.25)
    student = il.prune(vlm, plan)
    healed  = il.heal(student, teacher=vlm, data=calib)
    result  = il.evaluate(student, baseline=vlm)
    il.export(student, "out/", records=(scores, plan, healed, result))
    il.fuse(student)

Every verb takes the record that the one before it made. `il.run` does the whole flow from a recipe,
`il.progressive` drops the layers in several stages, each scored and healed again.
The names are loaded when they are first used: importing the package loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interlace import errors, ops, records
    from interlace.data.samples import samples
    from interlace.evaluate import evaluate
    from interlace.export import export
    from interlace.heal import heal
    from interlace.models import open_model
    from interlace.nn import FuseReport, fuse, unfuse
    from interlace.pipeline import run
    from interlace.plan import make_plan, split_plan
    from interlace.progressive import ProgressiveResult, progressive
    from interlace.progressive.fixed_time import fixed_time
    from interlace.progressive.loss import layer_loss
    from interlace.records import (
        EvalReport,
        HealReport,
        Plan,
        ProgressiveRecord,
        PruneRecord,
        Scores,
    )
    from interlace.scores import score
    from interlace.surgery import prune

__all__ = [
    "EvalReport",
    "FuseReport",
    "HealReport",
    "Plan",
    "ProgressiveRecord",
    "ProgressiveResult",
    "PruneRecord",
    "Scores",
    "__version__",
    "errors",
    "evaluate",
    "export",
    "fixed_time",
    "fuse",
    "heal",
    "layer_loss",
    "make_plan",
    "open_model",
    "ops",
    "progressive",
    "prune",
    "records",
    "run",
    "samples",
    "score",
    "split_plan",
    "unfuse",
]

# public name -> module that holds it, in flow order
_HOMES = {
    "open_model": "interlace.models",
    "samples": "interlace.data.samples",
    "score": "interlace.scores",
    "layer_loss": "interlace.progressive.loss",
    "fixed_time": "interlace.progressive.fixed_time",
    "Scores": "interlace.records",
    "make_plan": "interlace.plan",
    "split_plan": "interlace.plan",
    "Plan": "interlace.records",
    "prune": "interlace.surgery",
    "PruneRecord": "interlace.records",
    "heal": "interlace.heal",
    "HealReport": "interlace.records",
    "evaluate": "interlace.evaluate",
    "EvalReport": "interlace.records",
    "export": "interlace.export",
    "progressive": "interlace.progressive",
    "ProgressiveResult": "interlace.progressive",
    "ProgressiveRecord": "interlace.records",
    "fuse": "interlace.nn",
    "unfuse": "interlace.nn",
    "FuseReport": "interlace.nn",
    "run": "interlace.pipeline",
}
_SUBMODULES = ("errors", "ops", "records")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"interlace.{name}")
    if name == "__version__":
        from importlib.metadata import version

        return version("interlace-vlm")
    if name not in _HOMES:
        raise AttributeError(f"module 'interlace' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    if _HOMES[name] == f"interlace.{name}":
        # by it `import interlace.heal.trainer as ...` finds what is in the package of this name
        value.__name__ = f"interlace.{name}"
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Keeps the verbs `heal`, `evaluate` and `export` apart from the packages of the same names.

    Importing interlace.heal makes the import system store that package as the attribute `heal` of
    this one, which would hide the function. The package stays in sys.modules, where every other
    form of import finds it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

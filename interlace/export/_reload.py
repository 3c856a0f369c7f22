"""Load checkpoints in a fresh process and write down what they compute.

Run as a script, with the path of a JSON list of requests. It imports nothing of this package,
except for checkpoints that are not standard, which only `open_model` loads. A request has the keys
`folder`, `architecture`, `standard`, `device`, `attention`, `threads`, `inputs` and `outputs`
(safetensors files) and `report` (a JSON file to write).
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def run(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every floating tensor that a forward gives, by its dotted name; not the KV cache."""
    extra = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    with torch.no_grad():
        return flatten(model(**inputs, **extra))


def flatten(output: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Collect the floating tensors of a nested output."""
    if isinstance(output, torch.Tensor):
        # cloned, since safetensors refuses tensors that share memory
        return (
            {name: output.detach().cpu().contiguous().clone()} if output.is_floating_point() else {}
        )
    if isinstance(output, dict):
        # the KV cache, by its name since transformers 5.24 and before
        left_out = ("cache", "past_key_values")
        items: Any = ((str(key), value) for key, value in output.items() if key not in left_out)
    elif isinstance(output, (list, tuple)):
        items = ((str(i), value) for i, value in enumerate(output))
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        found |= flatten(value, f"{name}.{key}" if name else key)
    return found


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint as its user would; gives the model and how loading went."""
    if not request["standard"]:
        from interlace.models import open_model

        model: Any = open_model(request["folder"]).model
        model.set_attn_implementation(request["attention"])
        return model, {}
    import transformers

    loaded: tuple[Any, dict[str, Any]] = getattr(
        transformers, request["architecture"]
    ).from_pretrained(
        request["folder"],
        attn_implementation=request["attention"],
        local_files_only=True,
        output_loading_info=True,
    )
    return loaded


def answer(request: dict[str, Any]) -> None:
    """Load one checkpoint, run it on the given inputs, and write its outputs and how it loaded."""
    import transformers

    torch.set_num_threads(request["threads"])
    model, loading = load(request)
    model.to(request["device"]).eval().requires_grad_(False)
    inputs = {
        name: value.to(request["device"]) for name, value in load_file(request["inputs"]).items()
    }
    save_file(run(model, inputs), request["outputs"])
    report = {
        "transformers": transformers.__version__,
        "package_loaded": "interlace" in sys.modules,
        **{key: sorted(map(str, names)) for key, names in loading.items() if key.endswith("_keys")},
    }
    Path(request["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        answer(each)

"""fuse and unfuse: what is swapped comes back, and a fused model stays an ordinary model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import accelerate
import pytest
import torch
from tiny import tiny_inputs
from tiny_base import Quantised
from transformers import DynamicCache

import interlace as il
from interlace.errors import ConfigError, PlanError
from interlace.models import VLM, family_of
from interlace.nn import fusing
from interlace.nn.cache_memory import CACHE
from interlace.nn.swap import Fused
from interlace.records import Plan, TowerPlan

if TYPE_CHECKING:
    from pathlib import Path


def _state(model: Any) -> dict[int, tuple[Any, ...]]:
    """Everything that unfusing has to bring back."""
    return {
        id(module): (
            type(module),
            {key: value for key, value in vars(module).items() if not key.startswith("_")},
            [id(parameter) for parameter in module.parameters(recurse=False)],
        )
        for module in model.modules()
    }


def _implementations(model: Any) -> list[Any]:
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return [config._attn_implementation for config in configs]


def _memory(model: Any) -> int:
    """Bytes of all parameters, what they share counted once."""
    storages = [parameter.untyped_storage() for parameter in model.parameters()]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_round_trips_are_bit_equal(family: str, kit: Any, tmp_path: Path) -> None:
    model = kit.build(family)
    inputs = kit.inputs(family, model)
    before, state = kit.forward(model, inputs), _state(model)
    configs = _implementations(model)
    names = list(model.state_dict())
    memory = _memory(model)
    model.save_pretrained(tmp_path / "stock")
    report = il.fuse(model)
    assert any(isinstance(module, Fused) for module in model.modules())
    assert list(model.state_dict()) == names
    # merged, not doubled
    assert _memory(model) == memory
    model.save_pretrained(tmp_path / "fused")
    for file in sorted((tmp_path / "stock").iterdir()):
        assert (tmp_path / "fused" / file.name).read_bytes() == file.read_bytes(), file.name
    assert len(report.fused) == sum(e.fused for e in report.entries)
    il.unfuse(model)
    assert _state(model) == state
    assert _implementations(model) == configs
    found = kit.forward(model, inputs)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_the_report_names_every_layer(family: str, kit: Any) -> None:
    model = kit.build(family)
    vlm = VLM(model, family_of(model), name=family)
    report = il.fuse(vlm)
    told = {entry.module for entry in report.entries}
    for tower in vlm.towers.values():
        for place in range(tower.num_layers):
            assert f"{tower.path}.{place}" in told
    modules = dict(model.named_modules())
    for entry in report.entries:
        swapped = isinstance(modules[entry.module], Fused)
        assert swapped == entry.fused or entry.part == "graphs"
        assert bool(entry.backend) == entry.fused
        assert entry.fused or entry.reason
    for module_name, module in modules.items():
        assert not isinstance(module, Fused) or module_name in told
    assert str(report).splitlines()[0].startswith(type(model).__name__)
    assert len(str(report).splitlines()) < 20


def test_fusing_twice_and_unfusing_twice_are_refused(kit: Any) -> None:
    model = kit.build("clip")
    il.fuse(model)
    with pytest.raises(ConfigError, match=r"fused already.*unfuse"):
        il.fuse(model)
    il.unfuse(model)
    with pytest.raises(ConfigError, match="is not fused"):
        il.unfuse(model)
    with pytest.raises(ConfigError, match="Linear"):
        il.fuse(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Nothing of CLIPModel"):
        il.fuse(model, attention=False, norms=False, mlp=False)


def test_projections_of_quantised_weights_stay_apart(kit: Any) -> None:
    model = kit.build("llava")
    layer = model.model.language_model.layers[1]
    for linear in (layer.self_attn.k_proj, layer.mlp.up_proj):
        linear.weight = Quantised(linear.weight.detach())
    report = il.fuse(model)
    assert layer.self_attn.interlace_state.merged is None
    told = [entry for entry in report.entries if "a weight is a Quantised" in entry.reason]
    assert [entry.module.rpartition(".")[2] for entry in told] == ["self_attn", "mlp"]
    assert type(layer.mlp.up_proj.weight) is Quantised


class _Packed(torch.nn.Module):
    """Stands for linear layers that hold no floating-point weight."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = (linear.weight.detach(), linear.bias)

    def weight(self) -> torch.Tensor:
        """Unpack, as torch's dynamically quantised layers do."""
        return self.packed[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project."""
        return torch.nn.functional.linear(x, *self.packed)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_linear_layers_without_weights_run_as_they_are(kit: Any, family: str) -> None:
    model = kit.build(family)
    inputs = tiny_inputs(family, model)
    for path, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and "attn" in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Packed(linear))
    with torch.no_grad():
        wanted = model(**inputs).logits
        il.fuse(model)
        found = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real])


def test_a_model_whose_modules_accelerate_calls_is_refused(kit: Any) -> None:
    model = kit.build("clip")
    places = {"vision_model": "cpu", "text_model": "cpu", "": "cpu"}
    accelerate.dispatch_model(model, places, force_hooks=True)
    with pytest.raises(ConfigError, match=r"accelerate calls.*Load the model on one device"):
        il.fuse(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert il.fuse(model).fused


def test_what_is_fused_in_part_is_refused(kit: Any) -> None:
    model = kit.build("llava")
    il.fuse(model.model.language_model)
    with pytest.raises(ConfigError, match="A part of LlavaForConditionalGeneration"):
        il.fuse(model)
    il.unfuse(model.model.language_model)
    il.fuse(model)
    with pytest.raises(ConfigError, match="or a model that it is a part of"):
        il.fuse(model.model.language_model)


@pytest.mark.parametrize("place", ["first weights", "later weights", "biases", "blocks", "report"])
def test_what_fails_halfway_is_undone(
    place: str, kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = kit.build("qwen2_vl")
    inputs = kit.inputs("qwen2_vl", model)
    before, state, chosen = kit.forward(model, inputs), _state(model), _implementations(model)
    stock, calls = torch.cat, []
    failing = {"first weights": 1, "biases": 2, "later weights": 5}

    def cat(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == failing[place]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(*args, **kwargs)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if place in failing:
            patch.setattr(torch, "cat", cat)
        else:
            patch.setattr(fusing, {"blocks": "arguments", "report": "record"}[place], fail)
        with pytest.raises((torch.OutOfMemoryError, KeyboardInterrupt)):
            il.fuse(model)
    assert _state(model) == state
    assert _implementations(model) == chosen
    storages = [each.untyped_storage().nbytes() for each in model.model.parameters()]
    assert storages == [each.nbytes for each in model.model.parameters()]
    found = kit.forward(model, inputs)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    with pytest.raises(ConfigError, match="is not fused"):
        il.unfuse(model)
    assert il.fuse(model).fused


@pytest.mark.parametrize("part", ["attention", "norms", "mlp", "rope"])
def test_parts_can_be_left_out(part: str, kit: Any) -> None:
    model = kit.build("qwen3_vl")
    inputs = kit.inputs("qwen3_vl", model)
    plain = kit.forward(model, inputs)
    exact = kit.in_fp64(model)
    truth = kit.forward(exact, kit.cast(inputs, torch.float64))
    report = il.fuse(model, **{part: False})
    kinds = {"attention": {"attention"}, "norms": {"norm", "block"}, "mlp": {"mlp"}, "rope": set()}
    assert not kinds[part] & {entry.part for entry in report.fused}
    assert kit.excesses(kit.forward(model, inputs), plain, truth) == []


def test_training_and_loading_reach_the_merged_weights(kit: Any) -> None:
    model = kit.build("llava")
    inputs = kit.inputs("llava", model)
    twin = copy.deepcopy(model)
    il.fuse(model)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        each(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(kit.forward(model, inputs), kit.forward(twin, inputs))
    other = kit.build("llava", seed=1)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(kit.forward(model, inputs), kit.forward(other, inputs))
    model.load_state_dict(twin.state_dict(), assign=True)
    torch.testing.assert_close(kit.forward(model, inputs), kit.forward(twin, inputs))


@pytest.mark.parametrize("step", [il.fuse, il.unfuse])
def test_what_is_done_in_inference_mode_can_be_trained(step: Any, kit: Any) -> None:
    model = kit.build("llava")
    if step is il.unfuse:
        il.fuse(model)
    with torch.inference_mode():
        step(model)
    model(**kit.inputs("llava", model)).logits.square().mean().backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_moving_copying_and_replacing_keep_it_right(kit: Any) -> None:
    model = kit.build("llava")
    inputs = kit.inputs("llava", model)
    il.fuse(model)
    plain = kit.forward(model, inputs)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(kit.forward(twin, inputs), plain, rtol=0, atol=0)
    layer = twin.model.language_model.layers[0]
    merged = layer.mlp.interlace_state.merged
    with torch.no_grad():
        assert merged.serves((layer.mlp.gate_proj, layer.mlp.up_proj))
    moved = twin.double().float()
    with torch.no_grad():
        assert merged.serves((layer.mlp.gate_proj, layer.mlp.up_proj))
    torch.testing.assert_close(kit.forward(moved, inputs), plain, rtol=0, atol=0)
    words = torch.ones(2, 5, dtype=torch.long, device="meta")
    assert copy.deepcopy(twin).to("meta")(words).logits.shape == (2, 5, 128)
    # a projection of another kind takes the place of one of the merged
    layer.mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    assert not torch.allclose(kit.forward(twin, inputs)[".logits"], plain[".logits"])


def test_hooks_are_called(kit: Any) -> None:
    model = kit.build("qwen3_vl")
    inputs = kit.inputs("qwen3_vl", model)
    il.fuse(model)
    layer = model.model.language_model.layers[5]
    heard = []
    for module in (
        layer.self_attn.k_proj,
        layer.self_attn.q_norm,
        layer.mlp.up_proj,
        layer.input_layernorm,
        layer.post_attention_layernorm,
        layer.mlp,
        layer,
    ):
        module.register_forward_hook(lambda module, *_: heard.append(module))
    plain = kit.forward(model, inputs)
    assert len(heard) == 7
    assert plain


def test_hidden_states_and_attention_weights_are_recorded(family: str, kit: Any) -> None:
    model = kit.build(family)
    inputs = kit.inputs(family, model)
    model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        plain = kit.outputs(model(**inputs, **asked), {})
        il.fuse(model)
        found = kit.outputs(model(**inputs, **asked), {})
    assert found.keys() == plain.keys()
    assert any("attentions" in name for name in found)
    real = {n: v.shape for n, v in plain.items()}
    assert {n: v.shape for n, v in found.items()} == real


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_layer_that_is_called_directly_fills_the_cache(name: str, kit: Any) -> None:
    decoder = kit.build("llava").model.language_model
    il.fuse(decoder)
    layer, hidden = decoder.layers[0], torch.randn(1, 5, 32)
    turns = decoder.rotary_emb(hidden, torch.arange(5)[None])
    name = CACHE if name == "cache" else name
    for module in (layer, layer.self_attn):
        cache = DynamicCache(config=decoder.config)
        with torch.no_grad():
            module(hidden, position_embeddings=turns, attention_mask=None, **{name: cache})
        assert cache.get_seq_length() == 5


def test_gradient_checkpointing_and_autocast(kit: Any) -> None:
    model = kit.build("qwen3_vl").train()
    inputs = kit.inputs("qwen3_vl", model)
    truth, scales = kit.gradients(model, inputs)
    il.fuse(model)
    # the older name warns since the newer one exists
    newer = hasattr(model, "activation_checkpointing_enable")
    kind = "activation_checkpointing" if newer else "gradient_checkpointing"
    getattr(model, f"{kind}_enable")()
    found, _ = kit.gradients(model, inputs, scales)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    getattr(model, f"{kind}_disable")()
    with torch.autocast("cpu", torch.bfloat16):
        fused = kit.forward(model, inputs)
        il.unfuse(model)
        plain = kit.forward(model, inputs)
    torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05)


def test_inference_mode_and_long_inputs(kit: Any) -> None:
    # long enough for the ops of the CPU to take over, with norms passed from block to block
    model = kit.build("llava").model.language_model
    model.config.max_position_embeddings = 8192
    ids = torch.randint(3, 100, (1, 4200))
    with torch.no_grad():
        plain = model(ids, use_cache=False).last_hidden_state
        exact = kit.in_fp64(model)(ids, use_cache=False).last_hidden_state
    report = il.fuse(model)
    assert any("bridge_norm" in entry.backend for entry in report.fused)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model(ids, use_cache=False).last_hidden_state
        assert kit.excesses({"": found}, {"": plain}, {"": exact}) == []


def test_a_change_between_two_blocks_is_seen(kit: Any) -> None:
    model = kit.build("llava").model.language_model
    il.fuse(model)
    ids = torch.randint(3, 100, (1, 4200))
    add = lambda module, args, out: out.add_(0.5)  # noqa: E731
    with torch.no_grad():
        plain = model(ids, use_cache=False).last_hidden_state
        handle = model.layers[3].register_forward_hook(add)
        changed = model(ids, use_cache=False).last_hidden_state
        il.unfuse(model)
        truth = model(ids, use_cache=False).last_hidden_state
        handle.remove()
    torch.testing.assert_close(changed, truth, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(changed, plain, atol=1e-2)


def test_a_fused_model_is_not_pruned(kit: Any) -> None:
    model = kit.build("clip")
    vlm = VLM(model, family_of(model))
    il.fuse(vlm)
    plan = Plan({"text": TowerPlan(6, drop=(2,))})
    with pytest.raises(PlanError, match="unfuse"):
        il.prune(vlm, plan)
    il.unfuse(vlm)
    assert il.prune(vlm, plan).towers["text"].num_layers == 5

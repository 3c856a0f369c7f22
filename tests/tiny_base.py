"""What the tiny models have in common: their sizes, and weights that leave nothing to chance.

Every model is seeded, in eval mode, fp32, with weights of its own in every layer (norms and biases
included), so that a wrong order, a lost layer or a feature at the wrong place changes the output.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from tiny_batches import BOS, EOS, IMAGE_SIDE, PAD, PATCH_SIDE, VOCAB

if TYPE_CHECKING:
    import transformers as tf
    from torch import nn


class Quantised(torch.nn.Parameter):
    """Stands for tensors of other kinds that torchao puts into an nn.Linear."""


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter: matrices by fan-in, norm weights around 1, biases small, none zero."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        id(parameter)
        for module in model.modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in norms:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() < 2:
                parameter.copy_(0.1 * noise)
            else:
                # one matrix per expert
                fan_in = math.prod(
                    parameter.shape[-1:] if "experts" in name else parameter.shape[1:]
                )
                parameter.copy_(noise * min(0.3, 0.8 / math.sqrt(fan_in)))
    return model.eval()


_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def text_config(num_layers: int, **extra: Any) -> dict[str, Any]:
    sizes = {"num_key_value_heads": 2, "max_position_embeddings": 256}
    return encoder_config(num_layers, **(sizes | extra))


def vision_config(num_layers: int, **extra: Any) -> dict[str, Any]:
    sides = {"image_size": IMAGE_SIDE, "patch_size": PATCH_SIDE}
    return {**_SIZES, "num_hidden_layers": num_layers, **sides, **extra}


def encoder_config(num_layers: int, **extra: Any) -> dict[str, Any]:
    return {
        **_SIZES,
        "vocab_size": VOCAB,
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **extra,
    }


def built(cls: Any, config: tf.PretrainedConfig, seed: int) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    model = cls(config)
    randomise(model, seed)
    if model.can_generate():
        model.generation_config.pad_token_id = PAD
        model.generation_config.bos_token_id = BOS
        model.generation_config.eos_token_id = EOS
    return model

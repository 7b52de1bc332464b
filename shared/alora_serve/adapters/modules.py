"""The linear modules of a transformers model, as adapters name and measure them."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from alora_serve.adapters.targets import ModuleShape


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """Every Linear and Conv1D of ``model`` by full name: what PEFT's ``all-linear`` sees, and the output layer."""
    output_layer = model.get_output_embeddings()  # type: ignore[no-untyped-call] # transformers left it so
    shapes: dict[str, ModuleShape] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = ModuleShape(
                module.in_features, module.out_features, is_conv1d=False, is_output_layer=module is output_layer
            )
        elif isinstance(module, Conv1D):
            in_features, out_features = module.weight.shape
            shapes[name] = ModuleShape(in_features, out_features, is_conv1d=True)
    return shapes

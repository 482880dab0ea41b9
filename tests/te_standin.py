"""A stand-in for Transformer Engine on a CPU, to see that Megatron-Core and our code call it rightly.

Its modules take exactly the arguments of the published signatures (any other is a TypeError), compute in
torch, and note under which FP8 recipe they were called. The recipes are the published classes themselves.
"""

import contextlib
import dataclasses
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

from tests.te_source import FOLDER, signature

VERSION = "2.20.2"
_active: list[tuple[Any, Any]] = []  # recipe and group of the contexts that are open


def install() -> None:
    """Puts the stand-in where `import transformer_engine` finds it; before Megatron-Core is imported."""
    from megatron_codec import platform

    if "pydantic" not in sys.modules and importlib.util.find_spec("pydantic") is None:
        _module("pydantic").dataclasses = _module("pydantic.dataclasses", dataclass=dataclasses.dataclass)
    recipe = _load("transformer_engine.common.recipe", "transformer_engine/common/recipe/__init__.py")
    fp8 = {"FP8GlobalStateManager": FP8GlobalStateManager, "fp8_autocast": fp8_autocast}
    parts = {name: _module(f"transformer_engine.pytorch.{name}", **fp8) for name in ("fp8", "quantization")}
    pytorch = _module(
        "transformer_engine.pytorch",
        **parts,
        fp8_autocast=fp8_autocast,
        fp8_model_init=fp8_model_init,
        Linear=Linear,
        LayerNormLinear=LayerNormLinear,
        RMSNorm=RMSNorm,
        LayerNorm=Absent,
        GroupedLinear=Absent,
        DotProductAttention=DotProductAttention,
        ops=_module("transformer_engine.pytorch.ops", Sequential=Absent, FusibleOperation=Absent),
        distributed=_module(
            "transformer_engine.pytorch.distributed",
            activation_recompute_forward=contextlib.nullcontext,
            checkpoint=None,
            CudaRNGStatesTracker=object,
        ),
        module=_module(
            "transformer_engine.pytorch.module",
            base=_module("transformer_engine.pytorch.module.base", TransformerEngineBaseModule=Absent),
        ),
        tensor=_module(
            "transformer_engine.pytorch.tensor",
            QuantizedTensor=Absent,
            router=_module(
                "transformer_engine.pytorch.router",
                fused_topk_with_score_function=None,
                fused_compute_score_for_moe_aux_loss=None,
                fused_moe_aux_loss=None,
            ),
            float8_tensor=_module("transformer_engine.pytorch.tensor.float8_tensor", Float8Tensor=Absent),
            utils=_module(
                "transformer_engine.pytorch.tensor.utils",
                replace_raw_data=None,
                cast_master_weights_to_fp8=None,
            ),
        ),
        float8_tensor=_module("transformer_engine.pytorch.float8_tensor", Float8Tensor=Absent),
    )
    _module(
        "transformer_engine",
        __version__=VERSION,
        pytorch=pytorch,
        common=_module("transformer_engine.common", recipe=recipe),
    )
    real = platform.prepare
    platform.prepare = lambda: dataclasses.replace(real(), transformer_engine=True)


def _module(name: str, **attributes: Any) -> Any:
    module = ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]  a package: others lie below it
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def _load(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class FP8GlobalStateManager:
    """Which recipe is active."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return bool(_active) and _active[-1][0] is not None

    @staticmethod
    def get_fp8_recipe() -> Any:
        return _active[-1][0]


@contextlib.contextmanager
def fp8_autocast(*args: Any, **kwargs: Any):
    """Opens a recipe, with the published arguments."""
    signature("transformer_engine/pytorch/quantization.py", "fp8_autocast").bind(*args, **kwargs)
    _active.append((kwargs["fp8_recipe"] if kwargs.get("enabled", True) else None, kwargs.get("fp8_group")))
    try:
        yield
    finally:
        _active.pop()


@contextlib.contextmanager
def fp8_model_init(*args: Any, **kwargs: Any):
    """Weights stay as they are."""
    signature("transformer_engine/pytorch/quantization.py", "fp8_model_init").bind(*args, **kwargs)
    yield


class Absent(torch.nn.Module):
    """What must not be built."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError(type(self).__name__)


class _Module(torch.nn.Module):
    published: tuple[str, str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        bound = signature(*self.published).bind(*args, **kwargs)
        self.given: dict[str, Any] = dict(bound.arguments)
        self.recipes: list[str] = []

    def get_extra_state(self) -> torch.Tensor:
        """Empty, as Transformer Engine's own is without delayed scaling."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        """Nothing is kept."""

    def note(self, **kwargs: Any) -> None:
        """Checks the arguments of a forward call, and notes the recipe that is open."""
        signature(*self.published, "forward").bind(None, **kwargs)
        self.recipes.append(repr(_active[-1][0]) if FP8GlobalStateManager.is_fp8_enabled() else "none")


class Linear(_Module):
    """A matrix cut over the tensor-parallel group, by rows or by columns, with its collectives."""

    published = ("transformer_engine/pytorch/module/linear.py", "Linear")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.save_original_input = False
        given = self.given
        self.parallel_mode, self.tp_group = given["parallel_mode"], given["tp_group"]
        self.sequence_parallel = given["sequence_parallel"] and given["tp_size"] > 1
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        self.use_bias, self.tp_size = given["bias"], given["tp_size"]
        assert not self.use_bias and not given["return_bias"] and not given["fuse_wgrad_accumulation"]
        shape = [self.out_features, self.in_features]
        dim = 0 if self.parallel_mode == "column" else 1
        shape[dim] //= given["tp_size"]
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=given["params_dtype"]))
        from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

        set_tensor_model_parallel_attributes(self.weight, True, dim, 1)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        from megatron.core.tensor_parallel import mappings

        self.note(**kwargs)
        if self.parallel_mode == "column":
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
            return F.linear(x, self.weight)
        y = F.linear(x, self.weight)
        if self.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=self.tp_group)


class LayerNormLinear(Linear):
    """The same behind a norm."""

    published = ("transformer_engine/pytorch/module/layernorm_linear.py", "LayerNormLinear")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.given["normalization"] == "RMSNorm" and not self.given["zero_centered_gamma"]
        self.layer_norm_weight = _norm_weight(self.given, self.in_features)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = F.rms_norm(x, (self.in_features,), self.layer_norm_weight, self.given["eps"])
        return super().forward(x, **kwargs)


class RMSNorm(_Module):
    """A norm alone."""

    published = ("transformer_engine/pytorch/module/rmsnorm.py", "RMSNorm")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # What it does not name goes to the operation behind it, of the same name.
        operation = signature("transformer_engine/pytorch/ops/basic/rmsnorm.py", "RMSNorm")
        operation.bind(None, **self.given.get("kwargs", {}))
        self.size = self.given["hidden_size"]
        self.weight = _norm_weight(self.given, self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.given["eps"])


def _norm_weight(given: dict[str, Any], size: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=given["params_dtype"]))
    weight.sequence_parallel = given["sequence_parallel"]  # type: ignore[attr-defined]
    return weight


class DotProductAttention(_Module):
    """Causal attention, [s, b, n, d] to [s, b, n * d]."""

    published = (
        "transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py",
        "DotProductAttention",
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        assert self.given["attn_mask_type"] == "causal" and not self.given["attention_dropout"]

    def forward(self, query, key, value, attention_mask, **kwargs: Any) -> torch.Tensor:
        self.note(key_layer=key, value_layer=value, attention_mask=attention_mask, **kwargs)
        assert attention_mask is None and kwargs["attn_mask_type"] == "causal"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.given.get("softmax_scale"))
        return out.permute(2, 0, 1, 3).flatten(2)

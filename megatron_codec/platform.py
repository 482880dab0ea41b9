"""CUDA or CPU: the device, the communication backend, and what makes Megatron-Core run without CUDA.

With CUDA the backend is NCCL and nothing of torch is touched. Without CUDA the backend is gloo, and the
calls that Megatron-Core sends to CUDA by name are sent to the CPU instead: current device, streams and
events, random state, `device="cuda"` in tensor factories, and the type names that its optimizers compare.

This is the only file that patches anything. `prepare` has to run before `megatron.core` is imported, so
the packages `megatron_codec.parallel`, `model`, `training` and `inference` call it first.
"""

import contextlib
import functools
import importlib.util
import logging
import queue
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Platform:
    """What this process runs on.

    Attributes:
        device: where parameters and activations live.
        backend: of torch.distributed, `nccl` or `gloo`.
        transformer_engine: whether Transformer Engine's layers are used.
        description: one line for the log.
    """

    device: torch.device
    backend: str
    transformer_engine: bool
    description: str


@functools.cache
def prepare() -> Platform:
    """Chooses the platform of this process and, without CUDA, patches torch for Megatron-Core.

    Raises:
        RuntimeError: `megatron.core` was imported before it could be prepared.
    """
    _silence_megatron()
    if torch.cuda.is_available():
        fused = [name for name in ("transformer_engine", "apex") if importlib.util.find_spec(name)]
        return Platform(
            device=torch.device("cuda", torch.cuda.current_device()),
            backend="nccl",
            transformer_engine="transformer_engine" in fused,
            description=(
                f"CUDA over NCCL, {' and '.join(fused) or 'no fused kernels'}: nothing of torch patched"
            ),
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_codec.platform.prepare()")
    _hide_kernels_for_cuda()
    _send_cuda_to_cpu()
    _leave_out_collectives_of_one()
    _import_without_compiling()
    _keep_rng_on_cpu()
    return Platform(
        device=torch.device("cpu"),
        backend="gloo",
        transformer_engine=False,
        description=(
            "CPU over gloo: calls of Megatron-Core to torch.cuda (device, streams, events, random state, "
            "tensor factories, type names) are sent to the CPU; torch's own kernels instead of "
            "Transformer Engine and apex"
        ),
    )


def install_adam(adam: type[torch.optim.Optimizer]) -> None:
    """Makes Megatron-Core build `adam` where it finds neither Transformer Engine's Adam nor apex's.

    Megatron-Core resumes FusedAdam's layout (one `step` in each parameter group) rightly, and torch's own
    (a `step` tensor in each parameter's state) wrongly, without saying so; docs/decisions.md has the
    details. So `adam` has FusedAdam's layout and is treated as apex's. Call it once Megatron-Core is
    imported and before an optimizer is built.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:
        optimizer.USING_PYTORCH_OPTIMIZER = False
        optimizer.Adam = distrib_optimizer.Adam = adam
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


@functools.cache
def mend_recomputation() -> None:
    """Makes `--recompute-modules layernorm` work without Transformer Engine.

    Megatron-Core 0.16.1 takes `fp8=False` there for FP8, and asks Transformer Engine, which it could not
    import, for its state. Call it once Megatron-Core is imported.
    """
    from megatron.core.tensor_parallel import random

    recomputation: Any = random.CheckpointWithoutOutput
    initialize = recomputation.__init__

    def without_fp8(self, fp8=None):
        initialize(self, fp8=None)

    recomputation.__init__ = without_fp8


@functools.cache
def save_without_another_process() -> None:
    """Keeps what the writers of a checkpoint report in this process.

    Megatron-Core 0.16.1 spawns a process to hand it over, for saves that training does not wait for; ours are
    waited for. On every rank it imports all that the rank has imported, which takes seconds. Call it before
    the first save.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writers: Any = filesystem_async
    writers._results_queue = queue.SimpleQueue()


def _silence_megatron() -> None:
    """Drops warnings that no user of ours can act on; what is missing is said once in the log."""
    for message in (".*[Aa]pex", ".*Transformer Engine", ".*ModelOpt", ".*multi_tensor_", "full scope"):
        warnings.filterwarnings("ignore", message=message, module="megatron")
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    # Of torch, about calls that Megatron-Core makes.
    for message in (
        ".*torch.distributed.*is deprecated",
        ".*load_state_dict. is deprecated",
        ".*DTensor instead",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)


def _hide_kernels_for_cuda() -> None:
    """Hides Transformer Engine and apex: where they are installed and no GPU is seen, as on a login node,
    Megatron-Core would call their kernels for norms and updates. What is imported already stays."""
    modules: dict[str, Any] = sys.modules
    for name in ("transformer_engine", "apex", "amp_C"):
        if name not in modules and importlib.util.find_spec(name):
            modules[name] = None


class _Nothing:
    """A stream or an event that does nothing: on a CPU every call has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def _returns(value: Any):
    # A new function each time: torch's compiler refuses one object under two names.
    return lambda *args, **kwargs: value


def _send_cuda_to_cpu() -> None:
    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.current_device = _returns(cpu)
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _returns(None))
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream, cuda.default_stream = _returns(_Nothing()), _returns(_Nothing())
    cuda.stream = _returns(contextlib.nullcontext())
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _returns(None), _returns(None)

    # `with torch.device("meta")`, by which transformers loads, knows the factories by identity. It notes them
    # when it is first used: let them be torch's own.
    _device._device_constructors()

    def on_cpu(factory):
        @functools.wraps(factory)
        def make(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and "cuda" in str(device):
                kwargs["device"] = cpu
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return make

    for name in [
        "tensor",
        "zeros",
        "ones",
        "empty",
        "full",
        "arange",
        "rand",
        "randn",
        "randint",
        "empty_like",
        "zeros_like",
        "ones_like",
    ]:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self

    # The optimizers ask for the type by name and know CUDA's names only.
    type_of = torch.Tensor.type

    def type_name(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.")
        return type_of(self, dtype, *args, **kwargs)

    tensor.type = type_name
    for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, getattr(torch, name))


def _keep_rng_on_cpu() -> None:
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        # Not torch.manual_seed, which calls these.
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _leave_out_collectives_of_one() -> None:
    """Where one process gathers or reduces a buffer onto itself, gloo copies it over twice for nothing."""
    distributed: Any = torch.distributed

    def unless_alone(collective):
        @functools.wraps(collective)
        def run(output, input, *args, group=None, async_op=False, **kwargs):
            alone = distributed.get_world_size(group) == 1 and output.data_ptr() == input.data_ptr()
            if alone and not async_op:
                return None
            return collective(output, input, *args, group=group, async_op=async_op, **kwargs)

        return run

    for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(distributed, name, unless_alone(getattr(distributed, name)))


def _import_without_compiling() -> None:
    """Imports Megatron-Core with its jit fuser off.

    The fuser is torch.compile, bound at import: on a CPU it would call a C++ compiler in the first step.
    """
    torch_any: Any = torch
    compile_ = torch.compile
    torch_any.compile = lambda function=None, **kwargs: function or (lambda inner: inner)
    try:
        import megatron.core.jit

        megatron.core.jit.disable_jit_fuser()
    finally:
        torch_any.compile = compile_

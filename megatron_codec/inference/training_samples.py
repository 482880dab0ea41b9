"""Pictures from the model in training, for `--sample-interval`; tools/pretrain.py hands this to `pretrain`.

The engine computes with a second module object whose parameters are those of the training module, in the
same memory: nothing is copied, sequence parallelism and recomputation are off in it, and the hooks and modes
of the training module stay untouched.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from PIL import Image

from megatron_codec.codecs import DecodeError, get_codec
from megatron_codec.config import ParallelConfig, PretrainConfig, TrainingConfig
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.inference.cache import CachedAttention
from megatron_codec.inference.engine import Completion, Engine
from megatron_codec.inference.sampling import Sampling
from megatron_codec.model import build_model, transformer_config
from megatron_codec.parallel import PLATFORM, Layout
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampledPictures:
    """See `training.hooks.Sampled`."""

    sheet: Image.Image
    count: int
    seconds: float
    share_that_decodes: float
    share_with_valid_markers: float


class PictureSampler:
    """Samples `--num-samples` pictures from nothing, at temperature 1 and from the whole vocabulary, with the
    run's seed, so that the pictures of two steps differ by what was learnt between them.

    Raises:
        UserError: the codec of the dataset is not installed.
    """

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, codec: dict[str, Any]):
        self._config, self._tokenizer = config, tokenizer
        self._codec = get_codec(codec["name"], codec["settings"])
        self._engine: Engine | None = None

    def sample(self, module: GPTModel, layout: Layout) -> SampledPictures | None:
        """Every process calls it; those of the first data- and context-parallel replica sample, the others
        wait in the next collective. The main process gets the pictures, the others None."""
        if layout.dp_rank != 0 or layout.cp_rank != 0:
            return None
        layout = replace(layout, cp=1)
        started = time.perf_counter()
        with _random_state_kept(layout.device):
            engine = self._attach(module, layout)
            sampling = Sampling(seed=self._config.training.seed, n=self._config.logging.num_samples)
            rows = _rows_that_fit(engine.model.config, self._config, layout)
            completions = engine.generate([engine.prompt_ids()], sampling, batch_size=rows)
        return self._show(completions, started) if layout.is_main else None

    def _attach(self, module: GPTModel, layout: Layout) -> Engine:
        """The engine, with the memory of the module's parameters for its own."""
        if self._engine is None:
            model = self._config.model
            # Sequence parallelism and recomputation are left behind.
            config = transformer_config(
                model, ParallelConfig(), TrainingConfig(bf16=self._config.training.bf16), layout
            )
            # Transformer Engine is told to allocate nothing; Megatron-Core's own layers follow torch's
            # default device when they take themselves to be on a CPU.
            fused = PLATFORM.transformer_engine
            config = replace(
                config,
                perform_initialization=False,
                init_model_with_meta_device=fused,
                use_cpu_initialization=not fused,
            )
            with torch.device("meta"):
                twin = build_model(config, model, self._tokenizer.num_tokens, layout, CachedAttention)
            self._engine = Engine(twin, model, self._tokenizer, self._codec, layout)
        _share_parameters(module, self._engine.model)
        return self._engine

    def _show(self, completions: list[Completion], started: float) -> SampledPictures:
        pictures, valid = [], 0
        for completion in completions:
            valid += self._codec.check(completion.stream).valid
            try:
                pictures.append(completion.media)
            except DecodeError:
                pictures.append(None)
        count = len(pictures)
        columns = max(1, round(count**0.5))
        return SampledPictures(
            sheet=contact_sheet([pictures[i : i + columns] for i in range(0, count, columns)]),
            count=count,
            seconds=time.perf_counter() - started,
            share_that_decodes=sum(picture is not None for picture in pictures) / count,
            share_with_valid_markers=valid / count,
        )


def _share_parameters(module: GPTModel, twin: GPTModel) -> None:
    """Puts the module's parameters in the places of the twin's."""
    theirs = dict(module.named_parameters())
    for name, _ in list(twin.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(twin.get_submodule(owner), last, torch.nn.Parameter(theirs.pop(name).detach()))
    if theirs:
        raise RuntimeError(f"parameters that the engine's model lacks: {', '.join(theirs)}")


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leaves torch's generators and Megatron-Core's as they were."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert tracker is not None  # made by parallel.initialize
    states = tracker.get_states()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    tracker.set_states(states)


def _rows_that_fit(config: TransformerConfig, run: PretrainConfig, layout: Layout) -> int:
    """How many pictures are sampled together: on a GPU as many as its free memory has caches for."""
    wanted = run.logging.num_samples
    if layout.device.type != "cuda":
        return wanted
    groups = (config.num_query_groups or config.num_attention_heads) // layout.tp
    layers = config.num_layers // layout.pp
    width = config.kv_channels or config.hidden_size // config.num_attention_heads
    row = 2 * layers * groups * width * run.model.seq_length * config.params_dtype.itemsize
    free, _ = torch.cuda.mem_get_info(layout.device)
    free += torch.cuda.memory_reserved(layout.device) - torch.cuda.memory_allocated(layout.device)
    # The cache is copied when samples have ended, so there are two for a moment; and some is left alone.
    fit = torch.tensor(max(1, int(free / (3 * row))), device=layout.device)
    torch.distributed.all_reduce(fit, op=torch.distributed.ReduceOp.MIN, group=layout.groups.mp)
    return min(wanted, int(fit))

"""Pictures from the model in training, for `--sample-interval`; tools/pretrain.py hands this to `pretrain`.

The engine reads the weights of the training module where they lie, and calls none of its modules, so that
hooks, modes and random numbers of the training stay untouched. Its cache is there while it samples.
"""

import time
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import GPTModel
from PIL import Image

from megatron_codec.codecs import DecodeError, get_codec
from megatron_codec.config import PretrainConfig
from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.inference.blocks import BLOCK, blocks_for
from megatron_codec.inference.completion import Completion
from megatron_codec.inference.config import EngineConfig, blocks_that_fit
from megatron_codec.inference.engine import Engine
from megatron_codec.inference.sampling import Sampling
from megatron_codec.parallel import Layout
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampledPictures:
    """See `training.hooks.Sampled`."""

    sheet: Image.Image
    count: int
    seconds: float
    share_that_decodes: float
    share_valid: float


class PictureSampler:
    """Samples `--num-samples` pictures from nothing, at temperature 1, from the whole vocabulary and without
    the grammar, with the seed of the run: pictures of two steps differ by what was learnt between them.

    Raises:
        UserError: the codec of the dataset is not installed.
    """

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, codec: dict[str, Any]):
        self._config, self._tokenizer = config, tokenizer
        self._codec = get_codec(codec["name"], codec["settings"])

    def sample(self, module: GPTModel, layout: Layout) -> SampledPictures | None:
        """Every process calls it; those of the first data- and context-parallel replica sample, the others
        wait in the next collective. The main process gets the pictures, the others None."""
        if layout.dp_rank != 0 or layout.cp_rank != 0:
            return None
        started = time.perf_counter()
        model, count = self._config.model, self._config.logging.num_samples
        # Less cache than the samples could fill makes some wait; it must not end a run that trains.
        whole = blocks_for(model.seq_length)
        blocks = min(max(whole, blocks_that_fit(module.config, layout)), count * whole)
        config = EngineConfig(max_batch_size=count, cache_tokens=blocks * BLOCK)
        engine = Engine(module, model, self._tokenizer, self._codec, layout, config)
        sampling = Sampling(seed=self._config.training.seed, n=count, constrain=False, heal_prompt=True)
        completions = engine.generate([engine.prompt_ids()], sampling)
        return self._show(completions, started) if layout.is_main else None

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
            share_valid=valid / count,
        )

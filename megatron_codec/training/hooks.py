"""What `pretrain` is handed from above: training knows nothing of engines and codecs."""

from typing import Any, Protocol

from megatron.core.models.gpt import GPTModel
from PIL import Image

from megatron_codec.config import PretrainConfig
from megatron_codec.parallel import Layout
from megatron_codec.tokenizer import Tokenizer


class Sampled(Protocol):
    """Pictures that the model in training wrote."""

    @property
    def sheet(self) -> Image.Image:
        """All of them on one picture, RGB."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    @property
    def seconds(self) -> float:
        """How long sampling and decoding took."""
        ...

    @property
    def share_that_decodes(self) -> float:
        """Of all of them, as in samples.json of tools/generate.py."""
        ...

    @property
    def share_valid(self) -> float:
        """Of all of them, as in samples.json of tools/generate.py."""
        ...


class Sampler(Protocol):
    """Samples pictures from the weights that are being trained, and changes nothing."""

    def sample(self, module: GPTModel, layout: Layout) -> Sampled | None:
        """Every process calls it with its part of the model; the main process gets the pictures."""
        ...


class MakeSampler(Protocol):
    """Makes the sampler of a run, before processes meet."""

    def __call__(self, config: PretrainConfig, tokenizer: Tokenizer, codec: dict[str, Any]) -> Sampler:
        """Raises UserError for a codec that is not there."""
        ...

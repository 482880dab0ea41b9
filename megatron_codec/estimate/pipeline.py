"""What a pipeline stage holds: pieces of the model, and micro-batches whose activations wait in them.

Without virtual stages a stage has one piece and runs 1F1B. With v of them it has every PP-th of PP x v
pieces, and micro-batches pass through the stages v times. The order is Megatron-Core 0.16.1's
(`pipeline_parallel/schedules.py`).

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters" (2021), section 2.2.
"""

from dataclasses import dataclass

from megatron_codec.config import PretrainConfig


@dataclass(frozen=True)
class Pieces:
    """The pieces of one stage.

    Attributes:
        first, last: whether the embedding, and the output with the loss, are in its first and last piece.
        layers: numbers of the layers of each piece, in the whole model.
        in_flight: at the fullest moment, the piece that each micro-batch whose activations wait is in; a
            micro-batch counts once for each piece that it has passed through.
    """

    first: bool
    last: bool
    layers: tuple[range, ...]
    in_flight: tuple[int, ...]

    @property
    def interleaved(self) -> bool:
        """Whether the stage has more than one piece."""
        return len(self.layers) > 1

    @property
    def num_layers(self) -> int:
        """Of all pieces together."""
        return sum(map(len, self.layers))


def pieces(config: PretrainConfig, number: int, num_microbatches: int) -> Pieces:
    """Those of stage `number`, each process having `num_microbatches` in a step."""
    parallel = config.parallel
    pp, vp = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    each = config.model.num_layers // (pp * vp)
    starts = (each * (piece * pp + number) for piece in range(vp))
    warm_up = pp - number - 1 if vp == 1 else 2 * (pp - number - 1) + (vp - 1) * pp
    in_flight = min(warm_up + 1, vp * num_microbatches)
    return Pieces(
        first=number == 0,
        last=number == pp - 1,
        layers=tuple(range(start, start + each) for start in starts),
        # PP micro-batches pass through a piece, then the same through the next one.
        in_flight=tuple(passed // pp % vp for passed in range(in_flight)),
    )


def bubble(config: PretrainConfig, num_microbatches: int) -> float:
    """Share of a step's time in which a stage waits: (PP - 1) / (v m + PP - 1)."""
    parallel = config.parallel
    waits = parallel.pipeline_model_parallel_size - 1
    return waits / (parallel.num_virtual_stages_per_pipeline_rank * num_microbatches + waits)

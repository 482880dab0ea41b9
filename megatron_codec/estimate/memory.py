"""Memory of one GPU in training, by component, from the configuration alone.

Bytes are of one GPU; t = micro-batch x sequence tokens, s sequence, h hidden, f FFN, v rows of the padded
vocabulary. What is kept for the backward pass is read off `model/layers.py` and Megatron-Core 0.16.1, and
tests/unit/test_estimate.py holds it against real training steps on a CPU. Transformer Engine's layers keep
much the same tensors; they were not run.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4,
whose sums are redone here for RMSNorm, SwiGLU and an attention that keeps no s x s matrix.
"""

from dataclasses import asdict, dataclass

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate.traffic import traffic


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage at the fullest moment of a step.

    Attributes:
        weights: parameters as they are computed with.
        gradients: the fp32 buffer of Megatron-Core's DDP, whole on every data-parallel process.
        optimizer: this process's share of fp32 main weights and of Adam's two moments.
        activations: what the forward pass keeps, over all micro-batches in flight.
        logits: what the loss keeps; 0 but on the last stage.
        workspace: the largest temporaries of a backward pass and, under recomputation, one layer's
            activations.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of the components."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, on one of its tensor-parallel GPUs.

    Attributes:
        parameters: on this GPU, by component.
        in_flight: micro-batches whose activations are held at once under 1F1B.
        memory: with the recomputation that the configuration asks for.
        without_recompute, with_recompute: memory under both choices.
        traffic: bytes that this GPU sends in a step, by kind.
        fp8_copies: bytes that FP8 adds: each matrix of a layer in FP8, and its transpose.
    """

    parameters: dict[str, int]
    in_flight: int
    memory: Memory
    without_recompute: Memory
    with_recompute: Memory
    traffic: dict[str, int]
    fp8_copies: int


def layer_parameters(config: PretrainConfig, tp: int) -> tuple[int, int]:
    """Parameters of one layer on one GPU: in matrices, which are cut, and in norms, which are not."""
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    return (4 * h * h + 3 * h * f) // tp, 2 * h


def stage(config: PretrainConfig, number: int, dp: int, rows: int) -> Stage:
    """Stage `number` of the pipeline, for `dp` data-parallel processes and `rows` of the embedding."""
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers, h = model.num_layers // pp, model.hidden_size
    matrices, norms = layer_parameters(config, tp)
    first, last = number == 0, number == pp - 1
    parameters = {
        "embedding": rows * h // tp if first else 0,
        "layers": layers * (matrices + norms),
        "final norm and output": h + rows * h // tp if last else 0,
    }
    count = sum(parameters.values())
    in_flight = min(pp - number, training.num_microbatches(dp))
    kept = _Kept(config)

    def memory(recompute: bool) -> Memory:
        # Token ids are kept by the embedding.
        activations = kept.shared + in_flight * (
            layers * (kept.stream if recompute else kept.layer) + (8 * kept.tokens if first else 0)
        )
        # The loss is the fullest moment, or the backward pass of a layer's MLP: first of the last layer,
        # when the loss and the final norm are done with.
        head = kept.final_norm if last else 0
        logits = kept.logits(rows) if last else 0
        layer = kept.backward + (kept.layer if recompute else 0)
        loss = kept.loss_backward(rows) if last else 0
        return Memory(
            weights=(2 if training.bf16 else 4) * count,
            gradients=4 * count,
            # bf16 weights have an fp32 main copy; fp32 weights are their own.
            optimizer=(12 if training.bf16 else 8) * count // dp,
            activations=activations + head,
            logits=logits,
            # The gradient sent to the stage before is held until the next one is there.
            workspace=max(loss, layer - head - logits) + (0 if first else kept.stream),
        )

    without, with_ = memory(False), memory(True)
    return Stage(
        parameters=parameters,
        in_flight=in_flight,
        memory=with_ if training.recompute_granularity == "full" else without,
        without_recompute=without,
        with_recompute=with_,
        traffic=traffic(config, number, dp, count),
        fp8_copies=2 * layers * matrices,
    )


class _Kept:
    """Bytes that the modules keep of one micro-batch for the backward pass.

    Attributes:
        tokens: of the micro-batch.
        shared: once for all layers and micro-batches: cosines and sines of the rotary embedding and, under
            sequence parallelism, the buffer that the inputs of matrices are gathered in.
        stream: the residual stream, which is also the input of a layer.
        layer: all that a layer keeps, its input included.
        final_norm: its input, its output and the scale of each token.
        backward: temporaries of the backward pass of a layer, beside what is still kept.
    """

    def __init__(self, config: PretrainConfig):
        model, parallel, training = config.model, config.parallel, config.training
        self.tp, e = parallel.tensor_model_parallel_size, 2 if training.bf16 else 4
        t, h = training.micro_batch_size * model.seq_length, model.hidden_size
        f, heads = model.ffn_hidden_size // self.tp, model.num_attention_heads // self.tp
        self.tokens = t
        self.shared = model.seq_length * (h // model.num_attention_heads) * 4  # in fp32
        if parallel.sequence_parallel:
            self.shared += t * h * e
        own = t // self.tp if parallel.sequence_parallel else t  # tokens of norms and residuals here
        self.stream, scale = own * h * e, 4 * own
        attention = 4 * t * h * e // self.tp + 4 * t * heads  # q, k, v, output; log-sum-exp
        mlp = 3 * t * f * e  # gate and up side by side, and their product
        # The input, the input of the MLP, and both as they come out of their norms.
        self.layer = 4 * self.stream + 2 * scale + attention + mlp
        self.final_norm = 2 * self.stream + scale
        # In SwiGLU: gradients of gate, up and product, less the product. In the first matrix of the MLP:
        # gradients of gate, up, input and matrix, less gate, up and product.
        self.backward = self.stream + max(2 * t * f, t * h + 2 * h * f - t * f) * e

    def logits(self, rows: int) -> int:
        """What the loss keeps: fp32 log-probabilities, labels; a mask where the vocabulary is cut."""
        return self.tokens * (4 * rows // self.tp + 8 + (self.tp > 1))

    def loss_backward(self, rows: int) -> int:
        """Two fp32 gradients of torch's loss; Megatron-Core's works in place, beside bf16 logits."""
        return self.tokens * (8 if self.tp == 1 else 2) * rows // self.tp

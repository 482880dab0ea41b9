"""Memory of one GPU in training, by component, from the configuration alone.

Bytes are of one GPU; t = micro-batch x sequence / CP tokens, s sequence, h hidden, f FFN, v rows of the
padded vocabulary. What is kept for the backward pass is read off `model/layers.py` and Megatron-Core 0.16.1,
and tests/unit/test_estimate_steps.py holds it against real training steps on a CPU. Transformer Engine's
layers keep much the same tensors; where they differ, its published source was read (2.20), and they were not
run.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), section 4,
whose sums are redone here for RMSNorm, SwiGLU and an attention that keeps no s x s matrix.
"""

from dataclasses import asdict, dataclass

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate.pipeline import Pieces


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU of a pipeline stage at the fullest moment of a step.

    Attributes:
        weights: parameters as they are computed with.
        fp8_copies: of each matrix of a layer that is multiplied in FP8, in FP8, and its transpose.
        gradients: the fp32 buffer of Megatron-Core's DDP, whole on every data-parallel process.
        optimizer: this process's share, over DP x CP, of fp32 main weights and of Adam's two moments.
        activations: what the forward pass keeps, over all micro-batches in flight.
        logits: what the loss keeps; 0 but on the last stage.
        workspace: the largest temporaries of a backward pass and what is recomputed for it.
    """

    weights: int
    fp8_copies: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """Sum of the components."""
        return sum(asdict(self).values())


def layer_parameters(config: PretrainConfig, tp: int) -> tuple[int, int]:
    """Parameters of one layer on one GPU: in matrices, which are cut, and in norms, which are not."""
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    return (4 * h * h + 3 * h * f) // tp, 2 * h


def memory(
    config: PretrainConfig, held: Pieces, parameters: int, sharing: int, rows: int, on_cpu: bool
) -> Memory:
    """Of the stage that holds these pieces, with the recomputation that `config` asks for.

    Args:
        parameters: on this GPU.
        sharing: processes that share the optimizer, DP x CP.
        rows: of the padded vocabulary.
        on_cpu: count what this package's own layers keep on a CPU, and not Transformer Engine's on a GPU.
    """
    training, kept = config.training, _Kept(config, on_cpu)
    in_fp8 = sum(kept.is_fp8(layer) for piece in held.layers for layer in piece)
    matrices, _ = layer_parameters(config, kept.tp)
    # Token ids are kept by the embedding.
    ids = 8 * kept.tokens * held.in_flight.count(0) if held.first else 0
    activations = kept.shared + ids + sum(kept.piece(held.layers[i]) for i in held.in_flight)
    if held.interleaved:
        # Interleaved stages receive an input and a gradient ahead; on a CPU they do not free what they sent.
        activations += (2 + len(held.in_flight) * on_cpu) * kept.stream
    # The loss is the fullest moment, or the backward pass of a layer's MLP: first of the last layer, when the
    # loss and the final norm are done with.
    head = kept.final_norm if held.last else 0
    logits = kept.logits(rows) if held.last else 0
    loss = kept.loss_backward(rows) if held.last else 0
    layer = kept.backward + kept.recomputed(held.layers[len(held.layers) - 1])
    # Of interleaved pieces another one can go backward while the last one's logits wait.
    gone = head + (logits if len(held.layers) == 1 else 0)
    return Memory(
        weights=(2 if training.bf16 else 4) * parameters,
        fp8_copies=2 * in_fp8 * matrices,
        gradients=4 * parameters,
        # bf16 weights have an fp32 main copy; fp32 weights are their own.
        optimizer=(12 if training.bf16 else 8) * parameters // sharing,
        activations=activations + head,
        logits=logits,
        # The gradient sent to the stage before is held until the next one is there.
        workspace=max(loss, layer - gone) + (0 if held.first else kept.stream),
    )


class _Kept:
    """Bytes that the modules keep of one micro-batch for the backward pass.

    Attributes:
        tokens: of the micro-batch, on this process.
        shared: once for all layers and micro-batches: cosines and sines of the rotary embedding and, under
            sequence parallelism, the buffer that the inputs of matrices are gathered in.
        stream: the residual stream, which is also the input of a layer.
        attention: queries, keys, values, output and what else the attention keeps.
        mlp: gate and up side by side, and their product.
        layer: all that a layer keeps, its input included, where nothing is recomputed.
        final_norm: its input, its output and the scale of each token.
        backward: temporaries of the backward pass of a layer, beside what is still kept.
    """

    def __init__(self, config: PretrainConfig, on_cpu: bool = False):
        model, parallel, training = config.model, config.parallel, config.training
        self.config, self.on_cpu = config, on_cpu
        self.tp, e = parallel.tensor_model_parallel_size, 2 if training.bf16 else 4
        full = training.recompute_granularity == "full"
        self.recomputes = (training.recompute_num_layers or 1) if full else 0
        self.parts = training.recompute_modules if training.recompute_granularity == "selective" else ()
        t = training.micro_batch_size * model.seq_length // parallel.context_parallel_size
        h, f, heads = (
            model.hidden_size,
            model.ffn_hidden_size // self.tp,
            model.num_attention_heads // self.tp,
        )
        self.tokens = t
        self.shared = model.seq_length * (h // model.num_attention_heads) * 4  # in fp32
        if parallel.sequence_parallel:
            self.shared += t * h * e
        own = t // self.tp if parallel.sequence_parallel else t  # tokens of norms and residuals here
        self.stream, self.scale = own * h * e, 4 * own
        self.qkv = 3 * t * h * e // self.tp
        self.attention = self.qkv + t * h * e // self.tp + 4 * t * heads  # q, k, v; output; log-sum-exp
        if on_cpu:
            self.attention += self._gathered(e)
        self.mlp = 3 * t * f * e
        # The input, the input of the MLP, and both as they come out of their norms.
        self.layer = 4 * self.stream + 2 * self.scale + self.attention + self.mlp
        self.final_norm = 2 * self.stream + self.scale
        # In SwiGLU: gradients of gate, up and product, less the product. In the first matrix of the MLP:
        # gradients of gate, up, input and matrix, less gate, up and product.
        self.backward = self.stream + max(2 * t * f, t * h + 2 * h * f - t * f) * e

    def logits(self, rows: int) -> int:
        """What the loss keeps: fp32 log-probabilities, labels; a mask where the vocabulary is cut."""
        return self.tokens * (4 * rows // self.tp + 8 + (self.tp > 1))

    def loss_backward(self, rows: int) -> int:
        """Two fp32 gradients of torch's loss; Megatron-Core's works in place, beside bf16 logits."""
        return self.tokens * (8 if self.tp == 1 else 2) * rows // self.tp

    def piece(self, layers: range) -> int:
        """What a piece of the model of these layers keeps."""
        if not self.recomputes:
            return sum(map(self._layer, layers))
        if self.config.training.recompute_method == "block":
            return self.recomputes * self.stream + sum(map(self._layer, layers[self.recomputes :]))
        return len(layers) // self.recomputes * self.stream

    def recomputed(self, layers: range) -> int:
        """What is there once more while the last layers of a piece are recomputed, outputs included."""
        if self.recomputes:
            block = self.config.training.recompute_method == "block"
            if block and self.recomputes < len(layers):  # the backward pass begins with layers kept whole
                return 0
            return sum(map(self._layer, layers[-1 if block else -self.recomputes :]))
        extra = 0
        if "mlp" in self.parts:
            extra += self.mlp + self.stream
            if not self.on_cpu:
                extra += self.stream + self.scale
        if "layernorm" in self.parts and self.on_cpu:
            extra += 2 * self.stream  # computed anew, and copied to where it had been
        return extra

    def is_fp8(self, layer: int) -> bool:
        """Whether the matrices of this layer of the model are multiplied in FP8."""
        fp8, end = self.config.fp8, self.config.model.num_layers
        if fp8.first_last_layers_bf16:
            end -= fp8.num_layers_at_end_in_bf16
            if layer < fp8.num_layers_at_start_in_bf16:
                return False
        return fp8.in_hardware and layer < end

    def _layer(self, number: int) -> int:
        """What this layer of the model keeps, unless it is recomputed whole."""
        kept = self.layer
        if "core_attn" in self.parts:
            kept -= self.attention - self.qkv - self.qkv // 3
        if "mlp" in self.parts:
            kept -= self.mlp
            if not self.on_cpu:  # Transformer Engine's MLP begins with the norm
                kept -= self.stream + self.scale
        if "layernorm" in self.parts and self.on_cpu:
            kept -= 2 * self.stream
        if self.is_fp8(number):
            # Inputs of matrices in one byte; attention keeps its output for itself too, in bf16.
            kept -= self.stream // 2 - self.qkv // 6
            if "mlp" not in self.parts:
                kept -= self.stream // 2 + self.mlp // 6
        return kept

    def _gathered(self, e: int) -> int:
        """What `SdpaAttention` keeps besides under context parallelism, `e` bytes a value."""
        cp, model = self.config.parallel.context_parallel_size, self.config.model
        if cp == 1:
            return 0
        keys_and_values = (cp - 1) * self.qkv * 2 // 3
        order = 2 * 8 * model.seq_length
        # Its two pieces of the sequence attend to r + 1 and to 2 CP - r pieces.
        mask = (2 * cp + 1) * (model.seq_length // (2 * cp)) ** 2 * e
        angles = 2 * model.seq_length // cp * (model.hidden_size // model.num_attention_heads) * e
        return keys_and_values + order + mask + angles + self.qkv // 3  # outputs, and both side by side

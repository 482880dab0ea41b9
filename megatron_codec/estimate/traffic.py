"""What one GPU sends to others in a step, from the configuration alone.

Collectives are counted as rings send them: of n processes each sends (n - 1) / n of what is gathered or
reduced and scattered, and twice that for an all-reduce. The numbers are those of Megatron-Core 0.16.1;
tests/unit/test_estimate_steps.py counts them in real steps. Those of context parallelism are Transformer
Engine's (2.20, `context_parallel.py`, read and not run), or on a CPU this package's own.
"""

from megatron_codec.config import PretrainConfig


def traffic(config: PretrainConfig, number: int, dp: int, parameters: int, on_cpu: bool) -> dict[str, int]:
    """Bytes that a GPU of stage `number` sends in a step, by the group that it sends them in.

    Args:
        parameters: on this GPU.
        on_cpu: keys and values are gathered, as `SdpaAttention` does, and not passed around a ring.
    """
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, vp = parallel.context_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    e = 2 if training.bf16 else 4
    microbatches, layers = training.num_microbatches(dp), model.num_layers // pp
    stream = training.micro_batch_size * model.seq_length // cp * model.hidden_size * e
    first, last = number == 0, number == pp - 1
    sharing = dp * cp
    # An all-reduce is two: of attention and MLP, forward and backward. Sequence parallelism gathers the
    # inputs of the two first matrices, and of the output, once more for the gradients of the weights.
    collectives = (8 + 2 * parallel.sequence_parallel) * layers
    again = recomputed_layers(config) * layers // model.num_layers
    collectives += 4 * again + 2 * first + (2 + parallel.sequence_parallel) * last
    attention_again = again
    if training.recompute_granularity == "selective":
        collectives += 2 * layers * ("mlp" in training.recompute_modules)
        attention_again = layers * ("core_attn" in training.recompute_modules)
    own = stream // tp if parallel.sequence_parallel else stream
    keys_and_values = _keys_and_values(config, layers, attention_again, on_cpu) * stream // tp
    return {
        "tensor-parallel": microbatches * collectives * stream * (tp - 1) // tp,
        "context-parallel": microbatches * keys_and_values,
        "pipeline": microbatches * own * ((vp - first) + (vp - last)),
        # fp32 gradients are reduced and scattered, weights gathered; over DP x CP.
        "data-parallel": (4 + e) * parameters * (sharing - 1) // sharing,
    }


def recomputed_layers(config: PretrainConfig) -> int:
    """Layers of the whole model that `--recompute-granularity full` computes twice."""
    model, parallel, training = config.model, config.parallel, config.training
    if training.recompute_granularity != "full":
        return 0
    if training.recompute_method != "block":
        return model.num_layers
    pieces = parallel.pipeline_model_parallel_size * parallel.num_virtual_stages_per_pipeline_rank
    return pieces * (training.recompute_num_layers or 1)


def _keys_and_values(config: PretrainConfig, layers: int, again: int, on_cpu: bool) -> int:
    """How often a rank's share of keys, or as much, goes to another context-parallel rank."""
    parallel = config.parallel
    cp = parallel.context_parallel_size
    if on_cpu:  # keys and values are gathered, and their gradients reduced and scattered
        return (4 * layers + 2 * again) * (cp - 1)
    if parallel.cp_comm_type == "a2a":  # queries, keys, values and output; then their gradients
        return (8 * layers + 4 * again) * (cp - 1) // cp
    # Around the ring: keys and values forward, and backward with their gradients. Gathered it is as much.
    return (6 * layers + 2 * again) * (cp - 1)

"""What one GPU sends to others in a step, from the configuration alone.

Collectives are counted as rings send them: of n processes each sends (n - 1) / n of what is gathered or
reduced and scattered, and twice that for an all-reduce. The numbers are those of Megatron-Core 0.16.1;
tests/unit/test_estimate.py counts them in real steps.
"""

from megatron_codec.config import PretrainConfig


def traffic(config: PretrainConfig, number: int, dp: int, parameters: int) -> dict[str, int]:
    """Bytes that a GPU of stage `number` sends in a step: within its TP group, to other stages, within DP.

    Args:
        parameters: on this GPU.
    """
    model, parallel, training = config.model, config.parallel, config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    e = 2 if training.bf16 else 4
    microbatches = training.num_microbatches(dp)
    stream = training.micro_batch_size * model.seq_length * model.hidden_size * e
    first, last = number == 0, number == pp - 1
    # An all-reduce is two: of attention and MLP, forward and backward. Sequence parallelism gathers the
    # inputs of the two first matrices, and of the output, once more for the gradients of the weights.
    each = 8 + 2 * parallel.sequence_parallel
    if training.recompute_granularity == "full":
        each += 4
    collectives = each * model.num_layers // pp + 2 * first + (2 + parallel.sequence_parallel) * last
    own = stream // tp if parallel.sequence_parallel else stream
    return {
        "tensor-parallel": microbatches * collectives * stream * (tp - 1) // tp,
        "pipeline": microbatches * own * ((not first) + (not last)),
        # fp32 gradients are reduced and scattered, weights gathered.
        "data-parallel": (4 + e) * parameters * (dp - 1) // dp,
    }

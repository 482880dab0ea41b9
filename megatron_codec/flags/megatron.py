"""Megatron-LM's flags that are not flags here: what they take, why they are not here, what to use instead."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MegatronFlag:
    """A flag of Megatron-LM that is told apart from a misspelt one.

    Attributes:
        reason: why it is not a flag here.
        remedy: what to do instead.
        same: the value that is what happens here anyway, "" for a flag without a value; None where none is.
    """

    reason: str
    remedy: str = "leave it out"
    same: str | None = None


def _all(names: str, reason: str, remedy: str = "leave it out") -> dict[str, MegatronFlag]:
    return {f"--{name}": MegatronFlag(reason, remedy) for name in names.split()}


def _always(reason: str, **same: str) -> dict[str, MegatronFlag]:
    """Flags by their names with underscores, and the value that is what happens here anyway."""
    return {
        f"--{name.replace('_', '-')}": MegatronFlag(reason, "leave it out", value)
        for name, value in same.items()
    }


MEGATRON_FLAGS: dict[str, MegatronFlag] = {
    **_always(
        "the model is Llama-2 and has nothing else",
        use_mcore_models="",
        swiglu="",
        disable_bias_linear="",
        untie_embeddings_and_output_weights="",
        no_position_embedding="",
        normalization="RMSNorm",
        position_embedding_type="rope",
        attention_dropout="0.0",
        hidden_dropout="0.0",
    ),
    **_always("the optimizer is Adam", optimizer="adam"),
    **_always("checkpoints are always of this kind", ckpt_format="torch_dist", use_checkpoint_args=""),
    **_all(
        "tokenizer-type tokenizer-model vocab-file merge-file",
        "the tokenizer is read from the manifest of the dataset",
        "leave it out; tools/preprocess_jpeg.py --tokenizer sets it",
    ),
    **_all(
        "num-experts expert-model-parallel-size expert-tensor-parallel-size moe-router-topk moe-grouped-gemm "
        "moe-router-load-balancing-type moe-aux-loss-coeff moe-token-dispatcher-type",
        "there is no mixture of experts",
    ),
    **_all(
        "fp16 loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis",
        "half precision is bfloat16 only, which needs no loss scale",
        "use --bf16",
    ),
    **_all("group-query-attention num-query-groups", "every head has its own keys and values"),
    **_all("kv-channels", "a head is hidden-size / heads wide", "set --num-attention-heads"),
    **_all("rampup-batch-size", "the batch has one size", "set --global-batch-size"),
    **_all("dataloader-type", "the order of training is a function of the seed and the step"),
    **_all("distributed-backend", "NCCL is used on GPUs and gloo on a CPU"),
    **_all("use-flash-attn transformer-impl attention-backend", "layers are chosen by what is installed"),
    **_all(
        "lr-warmup-fraction lr-warmup-samples",
        "warm-up is counted in steps",
        "use --lr-warmup-iters: the fraction x --lr-decay-iters, or samples / --global-batch-size",
    ),
    **_all(
        "lr-decay-samples",
        "the decay is counted in steps",
        "use --lr-decay-iters: samples / --global-batch-size",
    ),
}

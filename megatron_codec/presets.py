"""Named starting points: the paper's models and small ones for 2 CPU cores. Flags replace single values."""

from dataclasses import replace

from megatron_codec.config import ModelConfig, PretrainConfig, TrainingConfig
from megatron_codec.errors import UserError

# The paper's Llama-2 7B at 12K tokens: 36,240 steps of 512 x 12,288 tokens are its 114B tokens, twice.
# (The size of the batch is ours.)
_JPEGLM_7B = PretrainConfig(
    model=ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=12288,
        max_position_embeddings=12288,
    ),
    training=TrainingConfig(
        micro_batch_size=1, global_batch_size=512, train_iters=36240, lr=3e-4, min_lr=3e-5,
        lr_warmup_iters=2000, bf16=True, recompute_granularity="full",
    ),
)  # fmt: skip

PRESETS: dict[str, PretrainConfig] = {
    "jpeglm-7b": _JPEGLM_7B,
    "avclm-7b": replace(
        _JPEGLM_7B,
        model=replace(_JPEGLM_7B.model, seq_length=32768, max_position_embeddings=32768),
        training=replace(_JPEGLM_7B.training, global_batch_size=128, train_iters=10014, lr_warmup_iters=500),
    ),
    # Sized so that two CPU cores learn something real in minutes. For the first few million tokens a small
    # model learns as much from each as a large one, and sees more of them (docs/performance.md).
    "jpeglm-tiny": PretrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=2, seq_length=304,
            max_position_embeddings=304,
        ),
        training=TrainingConfig(
            micro_batch_size=6, global_batch_size=6, train_iters=3000, lr=4e-3, min_lr=4e-4,
            lr_warmup_iters=100, bf16=True,
        ),
    ),
    # Clips of 64x48 have about 1,200 tokens at 1024 entries, seldom more than 2,048. With the few videos of
    # examples/pretrain_avclm_tiny.sh more steps make held-out ones less likely.
    "avclm-tiny": PretrainConfig(
        model=ModelConfig(
            num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=2, seq_length=2048,
            max_position_embeddings=2048,
        ),
        training=TrainingConfig(
            micro_batch_size=1, global_batch_size=1, train_iters=1000, lr=2e-3, min_lr=2e-4,
            lr_warmup_iters=100, bf16=True,
        ),
    ),
}  # fmt: skip


def preset(name: str) -> PretrainConfig:
    """The preset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}", "is not known", f"use one of {', '.join(PRESETS)}")
    return PRESETS[name]

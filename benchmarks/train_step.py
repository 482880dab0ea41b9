"""A training step of ours beside Hugging Face's Llama of the same shape, interleaved in one process.

    python benchmarks/train_step.py                    # 10.9M parameters, 2 x 1024 tokens, bf16
    python benchmarks/train_step.py --rounds 30 --micro-batch-size 6 --seq-length 304 --hidden-size 256 ...

A step is forward, backward and AdamW. Ours keeps fp32 gradients and fp32 main weights beside bf16 weights,
as it trains. Hugging Face's is measured in two habits: all of it in bf16 (the fastest it can be, with
bf16 gradients and no main weights), and fp32 weights under autocast (as its Trainer does with bf16=True).
The rounds interleave the three, and the ratios are medians over rounds, so that a noisy machine hits all.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro

from megatron_codec import parallel
from megatron_codec.config import ModelConfig, ParallelConfig, PretrainConfig, TrainingConfig
from megatron_codec.model import build_model, initialize_weights, transformer_config
from megatron_codec.training.optimizer import build_optimizer, build_schedule, data_parallel
from megatron_codec.training.step import connect, train_step


@dataclass(frozen=True)
class Arguments:
    """Shape and length of the comparison."""

    num_layers: int = 6
    hidden_size: int = 384
    ffn_hidden_size: int = 1024
    num_attention_heads: int = 6
    seq_length: int = 1024
    micro_batch_size: int = 2
    num_tokens: int = 322
    """Ids of the tokenizer, BOS and EOS included."""
    rounds: int = 12
    fp32: bool = False
    """Compare in fp32 instead of bf16."""


class RandomSamples:
    """Packed samples of random ids: the time of a step does not depend on what the tokens are."""

    def __init__(self, seq_length: int, num_tokens: int):
        self.seq_length, self.num_tokens = seq_length, num_tokens

    def sample(self, index: int):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, self.num_tokens, (self.seq_length + 1,), generator=generator).numpy()


def our_step(arguments: Arguments) -> tuple[Callable[[int], float], int]:
    """Returns a function that makes step i, and the number of parameters."""
    batch = arguments.micro_batch_size
    config = PretrainConfig(
        model=ModelConfig(
            num_layers=arguments.num_layers,
            hidden_size=arguments.hidden_size,
            ffn_hidden_size=arguments.ffn_hidden_size,
            num_attention_heads=arguments.num_attention_heads,
            seq_length=arguments.seq_length,
        ),
        training=TrainingConfig(
            micro_batch_size=batch, global_batch_size=batch, bf16=not arguments.fp32, lr=1e-4, min_lr=0.0
        ),
    )
    layout = parallel.initialize(ParallelConfig())
    megatron = transformer_config(config.model, config.parallel, config.training, layout)
    module = build_model(megatron, config.model, arguments.num_tokens, layout)
    initialize_weights(module, config.model, layout, seed=1)
    model = data_parallel([module], config.parallel, layout)
    optimizer = build_optimizer(model, config.training, config.parallel)
    schedule = build_schedule(optimizer, config.training)
    connect(model, optimizer)
    samples = RandomSamples(arguments.seq_length, arguments.num_tokens)

    def step(index: int) -> float:
        return train_step(model, optimizer, schedule, samples, index, config.training, layout).loss

    return step, sum(parameter.numel() for parameter in module.parameters())


def hugging_face_step(arguments: Arguments, autocast: bool) -> Callable[[int], float]:
    """The same shape and the same samples in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = ModelConfig().padded_vocab_size(arguments.num_tokens)
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=arguments.hidden_size,
            intermediate_size=arguments.ffn_hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_attention_heads,
            max_position_embeddings=arguments.seq_length,
            attn_implementation="sdpa",  # type: ignore[call-arg]  taken by the base class
            tie_word_embeddings=False,
        )
    )
    if not autocast and not arguments.fp32:
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    samples = RandomSamples(arguments.seq_length, arguments.num_tokens)

    def step(index: int) -> float:
        rows = [
            samples.sample(index * arguments.micro_batch_size + i) for i in range(arguments.micro_batch_size)
        ]
        packed = torch.stack([torch.from_numpy(row) for row in rows])
        tokens, labels = packed[:, :-1], packed[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    ours, parameters = our_step(arguments)
    contestants = {"megatron_codec": ours}
    if arguments.fp32:
        contestants["Hugging Face, fp32"] = hugging_face_step(arguments, autocast=False)
    else:
        contestants["Hugging Face, all bf16"] = hugging_face_step(arguments, autocast=False)
        contestants["Hugging Face, bf16 autocast"] = hugging_face_step(arguments, autocast=True)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(arguments.rounds + 2):
        for name, step in contestants.items():
            start = time.perf_counter()
            step(index)
            if index >= 2:  # the first steps allocate
                seconds[name].append(time.perf_counter() - start)
    tokens = arguments.micro_batch_size * arguments.seq_length
    print(f"{parameters / 1e6:.1f}M parameters, {arguments.micro_batch_size} x {arguments.seq_length} tokens")
    ratios = {}
    for name, times in seconds.items():
        pairs = zip(times, seconds["megatron_codec"], strict=True)
        ratios[name] = statistics.median(theirs / own for theirs, own in pairs)
        middle = statistics.median(times)
        print(
            f"{name:30s} {middle * 1000:8.1f} ms a step {tokens / middle:8.0f} tokens/s   "
            f"ours is {ratios[name]:.2f}x of it"
        )
    parallel.shut_down()
    del ratios["megatron_codec"]
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()

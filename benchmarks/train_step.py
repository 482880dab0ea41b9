"""A training step of ours beside Hugging Face's Llama of the same shape, in interleaved rounds.

    python benchmarks/train_step.py                          # 10.9M parameters, 2 x 1024 tokens, bf16
    python benchmarks/train_step.py --preset jpeglm-tiny --rounds 40
    python benchmarks/train_step.py --compile                # Hugging Face's under torch.compile too

A step is forward, backward, clipping and AdamW. Ours keeps fp32 gradients and fp32 main weights beside bf16
weights, as it trains. Hugging Face's is measured in two habits: all of it in bf16 (the least work that a step
can be, with bf16 gradients and no main weights), and fp32 weights under autocast (as its Trainer does with
bf16=True). Each runs in a process of its own, so that no patch or import of one reaches another; one computes
while the others sleep. Ratios are medians over rounds of (theirs / ours), so that a noisy machine hits all.
Memory is the most that a process held, less what it held after its imports.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import numpy as np
import tyro

from megatron_codec.config import ModelConfig, PretrainConfig, TrainingConfig
from megatron_codec.presets import preset


@dataclass(frozen=True)
class Arguments:
    """Shape and length of the comparison."""

    preset: str | None = None
    """Take the shape and the batch of this preset instead of the flags."""
    num_layers: int = 6
    hidden_size: int = 384
    ffn_hidden_size: int = 1024
    num_attention_heads: int = 6
    seq_length: int = 1024
    micro_batch_size: int = 2
    num_tokens: int = 322
    """Ids of the tokenizer, BOS and EOS included."""
    rounds: int = 20
    warm_up: int = 3
    """Rounds before those that count; the first steps allocate."""
    fp32: bool = False
    """Compare in fp32 instead of bf16."""
    compile: bool = False
    """Add Hugging Face's under torch.compile; compiling takes half a minute for each."""

    def config(self) -> PretrainConfig:
        """The same in the words of tools/pretrain.py: one micro-batch a step."""
        if self.preset is not None:
            config = preset(self.preset)
            return replace(config, training=replace(config.training, bf16=not self.fp32))
        model = ModelConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            seq_length=self.seq_length,
        )
        training = TrainingConfig(
            micro_batch_size=self.micro_batch_size,
            global_batch_size=self.micro_batch_size,
            bf16=not self.fp32,
            lr=1e-4,
            min_lr=0.0,
        )
        return PretrainConfig(model=model, training=training)


class RandomSamples:
    """Packed samples of random ids: the time of a step does not depend on what the tokens are."""

    def __init__(self, seq_length: int, num_tokens: int):
        self.seq_length, self.num_tokens = seq_length, num_tokens

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`, int64 [seq_length + 1]."""
        return np.random.default_rng(index).integers(0, self.num_tokens, self.seq_length + 1)


def our_step(config: PretrainConfig, num_tokens: int) -> Callable[[], Callable[[int], float]]:
    """Imports, and returns what builds the model and returns a function that makes step i."""
    from megatron_codec import parallel
    from megatron_codec.model import build_model, initialize_weights, transformer_config
    from megatron_codec.training.batches import Loader
    from megatron_codec.training.optimizer import build_optimizer, build_schedule, data_parallel
    from megatron_codec.training.step import connect, train_step

    def build() -> Callable[[int], float]:
        layout = parallel.initialize(config.parallel)
        megatron = transformer_config(config.model, config.parallel, config.training, layout)
        module = build_model(megatron, config.model, num_tokens, layout)
        initialize_weights(module, config.model, layout, seed=1)
        model = data_parallel([module], config.parallel, layout)
        optimizer = build_optimizer(model, config.training, config.parallel)
        schedule = build_schedule(optimizer, config.training)
        connect(model, optimizer)
        loader = Loader(RandomSamples(config.model.seq_length, num_tokens), config.training, layout)
        model[0].train()

        def step(i: int) -> float:
            return train_step(model, optimizer, schedule, loader, i, config.training, layout).loss

        return step

    return build


def hugging_face_step(
    config: PretrainConfig, num_tokens: int, autocast: bool, compiled: bool
) -> Callable[[], Callable[[int], float]]:
    """The same for the same shape and the same samples in transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, training = config.model, config.training

    def build() -> Callable[[int], float]:
        torch.manual_seed(1)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.padded_vocab_size(num_tokens),
                hidden_size=shape.hidden_size,
                intermediate_size=shape.ffn_hidden_size,
                num_hidden_layers=shape.num_layers,
                num_attention_heads=shape.num_attention_heads,
                max_position_embeddings=shape.seq_length,
                attn_implementation="sdpa",  # type: ignore[call-arg]  taken by the base class
                tie_word_embeddings=False,
            )
        )
        model.train()
        if training.bf16 and not autocast:
            model = model.bfloat16()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        samples = RandomSamples(shape.seq_length, num_tokens)

        def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=tokens, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

        compute = torch.compile(loss_of) if compiled else loss_of

        def step(i: int) -> float:
            first = i * training.micro_batch_size
            rows = [samples.sample(first + row) for row in range(training.micro_batch_size)]
            packed = torch.from_numpy(np.stack(rows))
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = compute(packed[:, :-1], packed[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    return build


def resident(kind: str) -> int:
    """KiB of this process, of /proc/self/status: `VmRSS` now, `VmHWM` at most so far."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind))


def contestant(name: str, arguments: Arguments, pipe: Connection) -> None:
    """A process: makes step i and returns its seconds for each i that comes, and the peak at a None."""
    config = arguments.config()
    if name == "megatron_codec":
        build = our_step(config, arguments.num_tokens)
    else:
        build = hugging_face_step(config, arguments.num_tokens, "autocast" in name, "compiled" in name)
    imported = resident("VmRSS")
    step = build()
    while (i := pipe.recv()) is not None:
        began = time.perf_counter()
        loss = step(i)
        pipe.send((time.perf_counter() - began, loss))
    pipe.send((resident("VmHWM") - imported) / 1024)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    habits = ["fp32"] if arguments.fp32 else ["all bf16", "bf16 autocast"]
    ways = ["", ", compiled"] if arguments.compile else [""]
    names = ["megatron_codec", *(f"Hugging Face, {habit}{way}" for way in ways for habit in habits)]
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contestant, args=(name, arguments, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(arguments.warm_up + arguments.rounds):
        for name, pipe in pipes.items():
            pipe.send(i)
            taken, _ = pipe.recv()
            if i >= arguments.warm_up:
                seconds[name].append(taken)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()

    config = arguments.config()
    model, batch = config.model, config.training.micro_batch_size
    tokens = batch * model.seq_length
    print(f"{model.num_layers} layers, {model.hidden_size} wide, {batch} x {model.seq_length} tokens")
    speed, memory = {}, {}
    for name, times in seconds.items():
        pairs = zip(times, seconds["megatron_codec"], strict=True)
        speed[name] = statistics.median(theirs / ours for theirs, ours in pairs)
        memory[name] = peaks["megatron_codec"] / peaks[name]
        middle = statistics.median(times)
        print(
            f"{name:40s} {middle * 1000:7.1f} ms a step {tokens / middle:7.0f} tokens/s "
            f"{peaks[name]:6.0f} MiB   ours: {speed[name]:.2f}x the speed, {memory[name]:.2f}x the memory"
        )
    rest = names[1:]
    ratios = {f"speed of {name}": round(speed[name], 3) for name in rest}
    print(json.dumps(ratios | {f"memory of {name}": round(memory[name], 3) for name in rest}))


if __name__ == "__main__":
    main()

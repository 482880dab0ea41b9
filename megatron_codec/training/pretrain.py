"""Pretraining, from a configuration to a checkpoint. Read this first.

Every process runs this function: torchrun (or srun) starts one for each GPU, or a few on a CPU.
"""

import contextlib
import logging
import signal
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_codec import parallel
from megatron_codec.config import PretrainConfig, transformer_engine_installed
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.model import DelayedScales, build_model, initialize_weights, transformer_config
from megatron_codec.parallel import Layout
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training import checkpoint, sinks
from megatron_codec.training.batches import Loader
from megatron_codec.training.checkpoint import Description
from megatron_codec.training.corpora import Corpora, HeldOut, open_corpora
from megatron_codec.training.hooks import MakeSampler
from megatron_codec.training.metrics import Metrics
from megatron_codec.training.optimizer import (
    build_optimizer,
    build_schedule,
    data_parallel,
    gather_parameters,
)
from megatron_codec.training.profiler import ProfileWindow
from megatron_codec.training.step import connect, evaluate, train_step

logger = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, make_sampler: MakeSampler | None = None) -> float | None:
    """Trains until `train_iters`, or until it is asked to stop by SIGTERM or Ctrl-C; saves either way.

    Args:
        make_sampler: makes what samples pictures every `sample_interval` steps.

    Returns:
        The last mean nats a token on held-out documents, or None when none was computed.

    Raises:
        UserError: faults of the configuration, the data or the checkpoint.
    """
    config, corpora, start = _inputs(config)
    tokenizer = Tokenizer.from_dict(corpora.tokenizer)
    sampler = None
    if config.logging.sample_interval is not None:
        if make_sampler is None:
            raise ValueError("--sample-interval: pretrain() was given no make_sampler")
        sampler = make_sampler(config, tokenizer, corpora.codec)
    if start is not None and not config.checkpoint.finetune:
        done = Description.read(start).iteration
        if done >= config.training.train_iters:
            print(f" {start} has made all of --train-iters {config.training.train_iters} already")
            return None

    layout = parallel.initialize(config.parallel, config.training.seed)
    if layout.is_main:
        print(
            f" {parallel.PLATFORM.description}\n {layout}, {torch.get_num_threads()} threads a process",
            flush=True,
        )
    megatron = transformer_config(config.model, config.parallel, config.training, layout, config.fp8)
    chunks = [
        build_model(megatron, config.model, tokenizer.num_tokens, layout, chunk=number, fp8=config.fp8).to(
            layout.device
        )
        for number in range(layout.vp)
    ]
    if start is None:
        for chunk in chunks:
            initialize_weights(chunk, config.model, layout, config.training.seed)
    elif config.checkpoint.finetune:
        checkpoint.load_weights(start, chunks)
    model = data_parallel(chunks, config.parallel, layout)
    optimizer = build_optimizer(model, config.training, config.parallel)
    schedule = build_schedule(optimizer, config.training)
    scales = DelayedScales(chunks, layout)
    fp8 = asdict(config.fp8) if config.fp8.fp8_format else None
    connect(model, optimizer)

    iteration = 0
    if start is not None and not config.checkpoint.finetune:
        before = Description.read(start)
        checkpoint.load(start, chunks, optimizer, schedule)
        if before.fp8 == fp8:  # else the scales start anew, as at the start of a run
            checkpoint.load_scales(start, scales)
        iteration = before.iteration

    train = Loader(
        corpora.train, config.training, layout, config.data.num_workers, config.training.train_iters - 1
    )
    metrics = Metrics(config, layout, iteration, tokenizer.num_tokens)
    profile = ProfileWindow(config, layout)
    if iteration:
        metrics.say(f"going on from {start} at iteration {iteration}")
    stop = StopRequest(layout)
    saved, validation_loss = iteration, None

    def save() -> None:
        gather_parameters(model)
        folder = checkpoint.save(
            Path(config.checkpoint.save or ""),
            Description(
                model=config.model,
                tokenizer=corpora.tokenizer,
                codec=corpora.codec,
                dataset_hash=corpora.hash,
                iteration=iteration,
                consumed_samples=iteration * config.training.global_batch_size,
                bf16=config.training.bf16,
                fp8=fp8,
            ),
            chunks,
            optimizer,
            schedule,
            scales,
            layout,
        )
        metrics.say(f"saved {folder}")

    def held_out(data: HeldOut | None, name: str = "validation") -> float | None:
        if data is None or not config.logging.eval_iters:
            return None
        batches = min(config.logging.eval_iters, -(-data.num_rows // config.training.global_batch_size))
        loader = Loader(data.rows, config.training, layout)
        loss = evaluate(model, loader, batches, config.training, layout)
        rows = batches * config.training.global_batch_size
        bits = data.bits_per_byte(loss, rows, tokenizer) if layout.is_main else None
        metrics.evaluation(iteration, loss, bits, name)
        return loss

    with contextlib.ExitStack() as ends:  # also where a step fails, so that what was measured is written
        for part in (stop, metrics, profile, train):
            ends.callback(part.close)
        for chunk in model:
            chunk.train()
        profile.reached(iteration)
        metrics.restart_clock()
        while iteration < config.training.train_iters and not stop.requested():
            learning_rate = optimizer.param_groups[0]["lr"]
            result = train_step(model, optimizer, schedule, train, iteration, config.training, layout)
            scales.update()
            iteration += 1
            metrics.step(iteration, learning_rate, result)
            if profile.reached(iteration):
                metrics.restart_clock()
            if iteration % config.logging.eval_interval == 0 and iteration < config.training.train_iters:
                validation_loss = held_out(corpora.valid)
                metrics.restart_clock()
            if sampler is not None and iteration % (config.logging.sample_interval or 1) == 0:
                gather_parameters(model)
                metrics.samples(iteration, sampler.sample(chunks[0], layout))
                metrics.restart_clock()
            if config.checkpoint.save_interval and iteration % config.checkpoint.save_interval == 0:
                save()
                saved = iteration
                metrics.restart_clock()

        if config.checkpoint.save and saved < iteration:
            save()
        if iteration == config.training.train_iters:
            validation_loss = held_out(corpora.valid)
            held_out(corpora.test, "test")
        else:
            metrics.say(f"stopped on request at iteration {iteration}; the same command with --load goes on")
    return validation_loss


def _inputs(config: PretrainConfig) -> tuple[PretrainConfig, Corpora, Path | None]:
    """The configuration with its number of steps, the data, and the checkpoint to go on from.

    Looked at before processes meet, so that whatever is wrong with a command line is one message and
    nobody waits.
    """
    world_size = parallel.world_size_from_environment()
    faults = [*config.faults(world_size), *sinks.faults(config)]
    fused = parallel.PLATFORM.transformer_engine
    if config.fp8.in_hardware and not fused and transformer_engine_installed():
        faults.append(
            UserError(
                f"--fp8-format {config.fp8.fp8_format}",
                "needs a GPU, and torch sees none",
                "start on a machine with CUDA, or add --fp8-emulation to try the recipe without",
            )
        )
    corpora = start = None
    if not list(config.data.faults()):
        with collecting(faults):
            corpora = open_corpora(config)
    with collecting(faults):
        start = _starting_point(config, corpora)
    raise_all(faults)
    assert corpora is not None
    config = corpora.with_steps(config)
    config.check(world_size)  # what is said of --train-iters holds for --train-epochs too
    return config, corpora, start


def _starting_point(config: PretrainConfig, corpora: Corpora | None) -> Path | None:
    """The checkpoint to go on from, checked against this run and its data, or None for a fresh start."""
    if config.checkpoint.load is None:
        if config.checkpoint.save is not None and checkpoint.exists(config.checkpoint.save):
            raise UserError(
                f"--save {config.checkpoint.save}",
                "holds the checkpoints of a run already, and this one starts anew",
                f"add --load {config.checkpoint.save} to go on with it, or name another folder",
            )
        return None
    # A job script gives --load and --save the same folder; the first time it is empty.
    if config.checkpoint.load == config.checkpoint.save and not checkpoint.exists(config.checkpoint.load):
        return None
    start = checkpoint.latest(config.checkpoint.load)
    description = Description.read(start)
    differing = [
        f"{name} {there}, not {here}"
        for name, here in asdict(config.model).items()
        if (there := getattr(description.model, name)) != here
        and name not in ("seq_length", "max_position_embeddings")
    ]
    if differing:
        raise UserError(
            f"--load {config.checkpoint.load}",
            f"is a model of another shape: it has {'; '.join(differing)}",
            "give the same --preset and model flags as for the run that wrote it",
        )
    if not (description.optimizer or config.checkpoint.finetune):
        raise UserError(
            f"--load {config.checkpoint.load}",
            "has weights and no optimizer state: it was converted",
            "add --finetune to start from its weights",
        )
    if corpora is not None and description.tokenizer.get("hash") != corpora.tokenizer.get("hash"):
        raise UserError(
            f"--load {config.checkpoint.load}",
            "was trained with another tokenizer than the dataset was made with",
            "make the dataset with the tokenizer of the checkpoint, or start anew without --load",
        )
    return start


class StopRequest:
    """SIGTERM or Ctrl-C on any process ends the run on all of them, after the step and a checkpoint."""

    def __init__(self, layout: Layout):
        self.layout, self.seen = layout, False
        self.previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _note(self, number: int, frame) -> None:
        if self.seen and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.seen = True

    def requested(self) -> bool:
        """Whether any process has been asked to stop; every process calls it."""
        flag = torch.tensor(float(self.seen), device=self.layout.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def close(self) -> None:
        """Gives the signals back to who had them before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

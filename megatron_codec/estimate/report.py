"""The text of `--dry-run`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.estimate.gpus import GPUS, gpu
from megatron_codec.estimate.run import GIB, RESERVED, Estimate, estimate, faults

SECONDS_A_DAY = 24 * 60 * 60


def dry_run(
    config: PretrainConfig, world_size: int, vocab_size: int, mfu: float, gpu_name: str | None = None
) -> str:
    """What a run on `world_size` GPUs would need, for people.

    Args:
        vocab_size: bytes and merges of the tokenizer; BOS and EOS come on top.
        mfu: utilization that the speeds are computed for, of the peak, counting all of attention.
        gpu_name: of `GPUS`; all of them by default.

    Raises:
        UserError: everything that is wrong with the values, at once.
    """
    wrong = list(faults(config, world_size))
    wrong += _faults(vocab_size, mfu, gpu_name)
    raise_all(wrong)
    run = estimate(config, world_size, vocab_size + 2)
    names = [gpu_name] if gpu_name else list(GPUS)
    lines = [*_configuration(config), "", *_layout(run, vocab_size), ""]
    lines += [*_memory(run), "", *_fit(run, names), "", *_time(run, names, mfu)]
    return "\n".join(lines)


def _faults(vocab_size: int, mfu: float, gpu_name: str | None) -> Iterator[UserError]:
    if vocab_size < 256:
        yield UserError(
            f"--vocab-size {vocab_size}", "must be at least 256, the bytes", "give bytes and merges, as 320"
        )
    if not 0 < mfu <= 1:
        yield UserError(f"--mfu {mfu}", "must be above 0 and at most 1", "leave it out for the default")
    try:
        gpu(gpu_name or next(iter(GPUS)))
    except UserError as fault:
        yield fault


def _configuration(config: PretrainConfig) -> Iterator[str]:
    """The flags that would set every value, a line a group."""
    yield "Configuration"
    for group in fields(config):
        values = asdict(getattr(config, group.name))
        flags = [_flag(name, value) for name, value in values.items() if value not in (None, ())]
        if flags:
            yield f"  {group.name + ':':11} {' '.join(flags)}"


def _flag(name: str, value: object) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"--{flag} {' '.join(map(str, value))}"
    return f"--{flag} {value}"


def _layout(run: Estimate, vocab_size: int) -> Iterator[str]:
    model, parallel, training = run.config.model, run.config.parallel, run.config.training
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    yield "Model and layout"
    yield (
        f"  parameters  {run.parameters:,}, with an embedding of {run.vocab_rows} rows for "
        f"--vocab-size {vocab_size} with BOS and EOS"
    )
    yield f"  layout      TP={tp} PP={pp} DP={run.dp} on {run.world_size} GPUs"
    yield (
        f"  step        {training.global_batch_size} x {model.seq_length:,} tokens: "
        f"{run.num_microbatches} micro-batches of {training.micro_batch_size} on each process"
    )
    yield f"  bubble      {run.bubble:.1%} of a step: (PP - 1) / (m + PP - 1), m micro-batches"


def _memory(run: Estimate) -> Iterator[str]:
    number = run.fullest
    stage = run.stages[number]
    where = f"stage {number} of {len(run.stages)}, the fullest" if len(run.stages) > 1 else "each GPU"
    yield f"Memory of {where}, GiB"
    for name, count in stage.parameters.items():
        yield f"  {name + ', parameters':34}{count:>16,}"
    none, full = asdict(stage.without_recompute), asdict(stage.with_recompute)
    rows = [("recomputation", "none", "full")]
    for name in none:
        label = name
        if name == "activations":
            label = f"activations, {stage.in_flight} micro-batch{'es' * (stage.in_flight > 1)} in flight"
        rows.append((label, f"{none[name] / GIB:.2f}", f"{full[name] / GIB:.2f}"))
    rows.append(
        ("total", f"{stage.without_recompute.total / GIB:.2f}", f"{stage.with_recompute.total / GIB:.2f}")
    )
    yield from _table(rows)
    sent = ", ".join(f"{name} {size / GIB:.2f}" for name, size in stage.traffic.items())
    yield f"  it sends in a step, GiB: {sent}"
    chosen = run.config.training.recompute_granularity
    yield f"  chosen: {f'--recompute-granularity {chosen}' if chosen else 'no recomputation'}"
    if len(run.stages) > 1:
        totals = ", ".join(f"{stage.memory.total / GIB:.2f}" for stage in run.stages)
        yield f"  totals of the stages, as chosen: {totals}"


def _fit(run: Estimate, names: Sequence[str]) -> Iterator[str]:
    aside = f"{RESERVED / GIB:.0f} GiB set aside for CUDA, NCCL and fragmentation, an assumption"
    yield f"What fits, with {aside}"
    rows: list[Sequence[str]] = [("GPU", "GiB", "none: needs", "left", "fits", "full: needs", "left", "fits")]
    for name in names:
        kind = GPUS[name]
        row = [kind.label, f"{kind.gib:.1f}"]
        for recompute in (False, True):
            left = run.headroom(kind, recompute)
            row += [
                f"{run.need(kind, recompute) / GIB:.1f}",
                f"{left / GIB:.1f}",
                "yes" if left >= 0 else "no",
            ]
        rows.append(row)
    yield from _table(rows)
    if any(GPUS[name].fp8 for name in names):
        yield "  FP8: with a copy of every matrix of the layers and of its transpose, 2 bytes a parameter"


def _time(run: Estimate, names: Sequence[str], mfu: float) -> Iterator[str]:
    causal = run.flops_causal / run.flops_full
    yield "Arithmetic and time, computed and not measured"
    yield (
        f"  FLOPs a token  {run.flops_full:.4e} counting all of attention (PaLM, 6N + 12 L h s), "
        f"{run.flops_causal:.4e} counting its causal half (Megatron-LM)"
    )
    yield f"  MFU            {mfu:.1%} of the peak (--mfu) in the first way, {mfu * causal:.1%} in the second"
    yield (
        f"  run            {run.steps:,} steps, {run.tokens / 1e9:.1f} billion tokens; "
        "recomputation is not counted as work"
    )
    rows = [("GPU", "peak TFLOP/s", "tokens/s/GPU", "s/step", "tokens/day", "days")]
    batch = run.config.training.global_batch_size * run.config.model.seq_length
    for name in names:
        kind = GPUS[name]
        each = run.tokens_per_second(kind, mfu)
        together = each * run.world_size
        rows.append(
            (
                kind.label,
                f"{kind.tflops:,.0f}",
                f"{each:,.0f}",
                f"{batch / together:.2f}",
                f"{together * SECONDS_A_DAY / 1e9:.2f}e9",
                f"{run.tokens / together / SECONDS_A_DAY:.1f}",
            )
        )
    yield from _table(rows)
    if run.config.training.train_epochs is not None:
        yield "  --train-epochs is not known without the data: the run is that of --train-iters."
    if not run.config.training.bf16:
        yield "  Without --bf16 no GPU reaches these peaks."


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([f"  {first:{widths[0]}}", *cells])

"""The text of `--dry-run`."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.estimate.gpus import GPUS, gpu
from megatron_codec.estimate.run import GIB, RESERVED, Estimate, estimate, faults
from megatron_codec.estimate.stages import chosen_recomputation

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
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VP": parallel.num_virtual_stages_per_pipeline_rank,
        "CP": parallel.context_parallel_size,
    }
    layout = [f"{name}={size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP")]
    yield "Model and layout"
    yield (
        f"  parameters  {run.parameters:,}, with an embedding of {run.vocab_rows} rows for "
        f"--vocab-size {vocab_size} with BOS and EOS"
    )
    yield f"  layout      {' '.join(layout)} DP={run.dp} on {run.world_size} GPUs"
    yield (
        f"  step        {training.global_batch_size} x {model.seq_length:,} tokens: "
        f"{run.num_microbatches} micro-batches of {training.micro_batch_size} on each process"
    )
    if sizes["CP"] > 1:
        yield (
            f"  sequence    {model.seq_length // sizes['CP']:,} tokens on each process; keys and values "
            f"are exchanged by Transformer Engine's {parallel.cp_comm_type}, and not kept"
        )
    yield (
        f"  bubble      {run.bubble:.1%} of a step: (PP - 1) / (v m + PP - 1), m micro-batches, "
        "v virtual stages"
    )


def _memory(run: Estimate) -> Iterator[str]:
    number, chosen = run.fullest, chosen_recomputation(run.config)
    stage = run.stages[number]
    where = f"stage {number} of {len(run.stages)}, the fullest" if len(run.stages) > 1 else "each GPU"
    yield f"Memory of {where}, GiB"
    for name, count in stage.parameters.items():
        yield f"  {name + ', parameters':34}{count:>16,}"
    columns = {"none": stage.without_recompute, "chosen": stage.memory, "full": stage.with_recompute}
    if chosen != "chosen":
        del columns["chosen"]
    rows: list[Sequence[str]] = [("recomputation", *columns)]
    interleaved = run.config.parallel.num_virtual_stages_per_pipeline_rank > 1
    one, several = ("piece", "pieces") if interleaved else ("micro-batch", "micro-batches")
    for name in asdict(stage.memory):
        label = name.replace("fp8_copies", "FP8 copies of weights")
        if name == "activations":
            label = f"activations, {stage.in_flight} {several if stage.in_flight > 1 else one} in flight"
        rows.append((label, *(f"{getattr(memory, name) / GIB:.2f}" for memory in columns.values())))
    rows.append(("total", *(f"{memory.total / GIB:.2f}" for memory in columns.values())))
    yield from _table(rows)
    sent = ", ".join(f"{name} {size / GIB:.2f}" for name, size in stage.traffic.items())
    yield f"  it sends in a step, GiB: {sent}"
    share = run.flops_recomputed / run.flops_full
    yield f"  chosen: {_flags_of_recomputation(run.config)}; it computes {share:.1%} of a step's FLOPs again"
    if len(run.stages) > 1:
        totals = ", ".join(f"{stage.memory.total / GIB:.2f}" for stage in run.stages)
        yield f"  totals of the stages, as chosen: {totals}"


def _flags_of_recomputation(config: PretrainConfig) -> str:
    training = config.training
    if training.recompute_granularity is None:
        return "no recomputation"
    flags = [f"--recompute-granularity {training.recompute_granularity}"]
    if training.recompute_granularity == "selective":
        flags.append(f"--recompute-modules {' '.join(training.recompute_modules)}")
    else:
        if training.recompute_method is not None:
            flags.append(f"--recompute-method {training.recompute_method}")
        if training.recompute_num_layers is not None:
            flags.append(f"--recompute-num-layers {training.recompute_num_layers}")
    return " ".join(flags)


def _fit(run: Estimate, names: Sequence[str]) -> Iterator[str]:
    aside = f"{RESERVED / GIB:.0f} GiB set aside for CUDA, NCCL and fragmentation, an assumption"
    yield f"What fits, with {aside}"
    columns: dict[str, bool | None] = {"none": False, "chosen": None, "full": True}
    if chosen_recomputation(run.config) != "chosen":
        del columns["chosen"]
    head = [word for name in columns for word in (f"{name}: needs", "left", "fits")]
    rows: list[Sequence[str]] = [("GPU", "GiB", *head)]
    for name in names:
        kind = GPUS[name]
        row = [kind.label, f"{kind.gib:.1f}"]
        for recompute in columns.values():
            left = run.headroom(kind, recompute)
            fits = "yes" if left >= 0 else "no"
            if kind.peak(run.config.fp8) is None:
                fits = "no FP8"
            row += [f"{run.need(recompute) / GIB:.1f}", f"{left / GIB:.1f}", fits]
        rows.append(row)
    yield from _table(rows)
    fp8 = run.config.fp8
    if fp8.in_hardware:
        yield "  FP8: with each matrix of its layers and the transpose in FP8, and its inputs kept in FP8"
        for name in names:
            if GPUS[name].peak(fp8) is None:
                has = (
                    f"has only {', '.join(GPUS[name].fp8_recipes)}"
                    if GPUS[name].fp8_recipes
                    else "has no FP8"
                )
                yield f"  {GPUS[name].label} {has}: not for --fp8-recipe {fp8.fp8_recipe}"
    elif fp8.fp8_format is not None:
        yield "  --fp8-emulation only rounds, and is slower than bf16; it is counted as bf16 here"


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
    rows: list[Sequence[str]] = [("GPU", "peak TFLOP/s", "tokens/s/GPU", "s/step", "tokens/day", "days")]
    batch = run.config.training.global_batch_size * run.config.model.seq_length
    for name in names:
        kind = GPUS[name]
        peak, each = kind.peak(run.config.fp8), run.tokens_per_second(kind, mfu)
        if peak is None or each is None:
            rows.append((kind.label, *["-"] * 5))
            continue
        together = each * run.world_size
        precision = " FP8" if run.config.fp8.in_hardware else ""
        rows.append(
            (
                kind.label,
                f"{peak:,.0f}{precision}",
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

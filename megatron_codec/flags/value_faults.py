"""What is wrong with the values beside a faulty flag, without what only follows from that flag."""

import re
from collections.abc import Iterator

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError, collecting
from megatron_codec.estimate import dry_run
from megatron_codec.flags.command_line import FLAG
from megatron_codec.flags.dry_run import DryRun

_LAYOUT = ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size")
_LENGTH = ("--train-iters", "--train-samples", "--train-epochs", "--train-flops")
_PLACES = ("--save", "--tensorboard-dir", "--wandb-project")
# Flags whose values decide whether others are right, where the message does not name both.
_DECIDES = {
    **dict.fromkeys(_LAYOUT, (*_LAYOUT, "--global-batch-size", "--recompute-num-layers")),
    "--world-size": ("--global-batch-size", "--profile-ranks"),
    "--micro-batch-size": ("--global-batch-size",),
    "--num-virtual-stages-per-pipeline-rank": ("--recompute-num-layers",),
    "--num-layers": ("--recompute-num-layers", "--num-virtual-stages-per-pipeline-rank"),
    "--lr-decay-iters": ("--lr-warmup-iters", "--lr-wsd-decay-iters"),
    **dict.fromkeys(_LENGTH, ("--lr-warmup-iters", "--lr-wsd-decay-iters", "--profile-steps")),
    "--lr-decay-style": ("--lr-wsd-decay-iters",),
    **dict.fromkeys(_PLACES, ("--sample-interval", "--profile-steps")),
}


def value_faults(
    config: PretrainConfig, world_size: int, touched: set[str], planned: DryRun | None
) -> list[UserError]:
    """Faults of the values and the datasets, or of a dry run, that do not speak of a flag in `touched`.

    Args:
        touched: flags whose values could not be read; in `config` they have their defaults.
    """
    touched = touched | {decided for flag in touched for decided in _DECIDES.get(flag, ())}
    found: list[UserError] = []
    if planned is None:
        found += config.faults(world_size)
        found += _dataset_faults(config, touched)
    else:
        if "--world-size" in touched:
            world_size = max(1, config.parallel.model_parallel_size)
        with collecting(found):  # it refuses all that is wrong before it computes anything
            dry_run(config, world_size, planned.vocab_size, planned.mfu, planned.gpu_name)
    return [fault for fault in found if not touched & set(re.findall(FLAG, str(fault)))]


def _dataset_faults(config: PretrainConfig, touched: set[str]) -> Iterator[UserError]:
    # Datasets are read with NumPy, which a right command line need not wait for here.
    from megatron_codec.data.opening import open_alike

    if config.data.mock_data or any(config.data.faults()):
        return
    found: list[UserError] = []
    with collecting(found):
        open_alike({flag: values for flag, values in config.data.paths.items() if flag not in touched})
    yield from found

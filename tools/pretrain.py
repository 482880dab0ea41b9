"""Pretrains a model on datasets of codec tokens.

    python tools/pretrain.py --preset jpeglm-tiny --train-data-path data/train --valid-data-path data/test \\
        --save checkpoints --load checkpoints
    torchrun --nproc-per-node 2 tools/pretrain.py --preset jpeglm-tiny --tensor-model-parallel-size 2 ...
    python tools/pretrain.py --preset jpeglm-7b --tensor-model-parallel-size 2 --dry-run --world-size 32
"""

import os
import sys

from megatron_codec.errors import run_tool


def main() -> None:
    # Imported here because the checkpoint writer starts processes that import this file.
    from megatron_codec.flags import parse

    command = parse()
    if command.unchanged and os.environ.get("RANK", "0") == "0":
        print(f" always so here, changed nothing: {' '.join(command.unchanged)}", file=sys.stderr)
    if command.dry_run is not None:
        from megatron_codec.estimate import dry_run

        planned = command.dry_run
        print(dry_run(planned.config, planned.world_size, planned.vocab_size, planned.mfu, planned.gpu_name))
        return
    from megatron_codec import parallel
    from megatron_codec.inference.training_samples import PictureSampler
    from megatron_codec.training.pretrain import pretrain

    try:
        pretrain(command.config, PictureSampler)
    finally:
        parallel.shut_down()


if __name__ == "__main__":
    run_tool(main)

"""A run of training whose models stay at hand."""

from typing import Any
from unittest import mock


def pretrain_and_keep(command_line: list[str], *rest: Any) -> list[Any]:
    """Runs a command line of tools/pretrain.py; `rest` is what `pretrain` takes beside it.

    Megatron-Core is imported here and not before, so a caller can prepare what it finds.

    Returns:
        The pieces of the decoder that this process trained.
    """
    from megatron_codec.flags import parse_pretrain
    from megatron_codec.training import pretrain

    models: list[Any] = []
    wrap = pretrain.data_parallel

    def remember(chunks, *arguments):
        models.extend(chunks)
        return wrap(chunks, *arguments)

    with mock.patch.object(pretrain, "data_parallel", remember):
        pretrain.pretrain(parse_pretrain(command_line), *rest)
    return models

"""Megatron-LM's flags that are not flags here: what they take, why they are not here, what to use instead.

Names, values and meaning are those of Megatron-LM's megatron/training/arguments.py, core_r0.14.0 and later.
docs/megatron_flags.md is written from these tables (`page.py`).
"""

from megatron_codec.flags.megatron_flag import MegatronFlag, Table
from megatron_codec.flags.megatron_layout import LAYOUT
from megatron_codec.flags.megatron_model import MODEL
from megatron_codec.flags.megatron_run import RUN

TOPICS: dict[str, Table] = MODEL | LAYOUT | RUN
MEGATRON_FLAGS: Table = {name: flag for table in TOPICS.values() for name, flag in table.items()}
_FAMILIES = {name[:-1]: flag for name, flag in MEGATRON_FLAGS.items() if name.endswith("*")}


def megatron_flag(name: str) -> MegatronFlag | None:
    """What is known of a flag by its name, else by how it begins; None where it is none of Megatron-LM."""
    if name in MEGATRON_FLAGS:
        return MEGATRON_FLAGS[name]
    return next((flag for start, flag in _FAMILIES.items() if name.startswith(start)), None)

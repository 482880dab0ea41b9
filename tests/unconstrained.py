"""`Sampling` without the grammar: most prompts of the tests are random tokens, which begin no picture."""

from functools import partial

from megatron_codec.inference import sampling

Sampling = partial(sampling.Sampling, constrain=False)

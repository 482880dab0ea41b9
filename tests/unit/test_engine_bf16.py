"""The engine in bf16: on the kernels of csrc/ and on torch's operators, against the model in fp32."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_codec import _csrc, parallel
from megatron_codec.config import ParallelConfig, TrainingConfig
from megatron_codec.inference import Engine, EngineConfig
from megatron_codec.model import build_model, initialize_weights, transformer_config
from megatron_codec.tokenizer import Tokenizer
from tests.llama import NUM_TOKENS, SMALL
from tests.tiny import CODEC
from tests.unconstrained import Sampling

MODEL = replace(SMALL, hidden_size=128, ffn_hidden_size=320, seq_length=400, init_method_std=0.1)
PROMPTS = [[320, *np.random.default_rng(i).integers(0, 320, n).tolist()] for i, n in enumerate((0, 31, 200))]


def engine_of(bf16: bool, fused: bool = True) -> Engine:
    parallelism = ParallelConfig()
    layout = parallel.initialize(parallelism)
    config = transformer_config(MODEL, parallelism, TrainingConfig(bf16=bf16), layout)
    module = build_model(config, MODEL, NUM_TOKENS, layout)
    initialize_weights(module, MODEL, layout, 1)
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    engine = Engine(
        module, MODEL, tokenizer, CODEC, layout, EngineConfig(prefill_chunk_size=50, cache_tokens=4096)
    )
    assert engine.decoder.attention.fused == (bf16 and _csrc.has_amx())
    if bf16 and not fused:
        attention = engine.decoder.attention
        attention.fused, attention.cos, attention.sin = (
            False,
            attention.cos.bfloat16(),
            attention.sin.bfloat16(),
        )
    return engine


def logprobs_along(engine: Engine, texts: list[list[int]], n: int) -> list[torch.Tensor]:
    """Of each text, what the engine says of its tokens while it samples them: as prompts of one token more
    and more would be slow, the text is forced on it by replacing what it samples."""
    scores: dict[tuple[int, int], list[float]] = {}
    forced = {}

    def choose_forced(samples, logits):
        logprobs = torch.log_softmax(logits + engine.drawing.forbidden, -1)
        for sample, row in zip(samples, logprobs, strict=True):
            text = forced[sample.request.number]
            token = text[len(sample.tokens)]
            scores.setdefault((sample.request.number, sample.number), []).append(float(row[token]))
            sample.tokens.append(token)
            if len(sample.tokens) == len(text):
                engine.scheduler.remove(sample)

    engine._sample = choose_forced
    for prompt, text in zip(PROMPTS, texts, strict=True):
        request = engine.request(prompt, Sampling(n=n), lambda events: None)
        forced[request.number] = text
        engine.add(request)
    while engine.busy:
        engine.step()
    return [torch.tensor(values) for values in scores.values()]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "torch"])
def test_bf16_is_near_fp32(fused, n):
    """Rows that decode beside parts of prompts, alone and with a prompt that three samples share."""
    texts = [p + np.random.default_rng(9).integers(0, 320, 80).tolist() for p in PROMPTS]
    exact = logprobs_along(engine_of(bf16=False), texts, n)
    ours = logprobs_along(engine_of(bf16=True, fused=fused), texts, n)
    assert len(exact) == len(ours) == 3 * n
    for values, expected in zip(ours, exact, strict=True):
        assert len(values) == 80
        error = (values - expected).abs()
        # Log-probabilities of random tokens, -6.4 on average; measured were 0.014 and 0.07.
        assert error.mean() < 0.03 and error.max() < 0.15, (float(error.mean()), float(error.max()))
    assert torch.cat(exact).mean() < -5


def test_samples_of_one_prompt_in_bf16_are_those_of_separate_requests():
    engine = engine_of(bf16=True)
    together = engine.generate([PROMPTS[2]], Sampling(n=4, temperature=0, max_tokens=20))
    assert len({tuple(c.token_ids) for c in together}) == 1

"""The GPU's kernels and steps, in Triton's interpreter on a CPU, against torch's attention on the same cache.

What CUDA makes of them is in tests/cuda.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: it comes with torch for CUDA")

from dataclasses import replace

from megatron_codec.inference import Engine, EngineConfig, gpu_kernels
from megatron_codec.inference.blocks import BLOCK, blocks_for
from megatron_codec.inference.graphs import DecodeGraphs
from megatron_codec.model.layers import Rotary
from megatron_codec.tokenizer import Tokenizer
from tests.llama import SMALL, small_model
from tests.tiny import CODEC
from tests.unconstrained import Sampling


@pytest.mark.parametrize(
    ("groups", "queries", "width", "dtype"),
    [(4, 1, 16, torch.float32), (2, 3, 24, torch.bfloat16), (1, 2, 64, torch.float32)],
)
def test_kernels(groups, queries, width, dtype):
    """Rows of one key to several parts, with tables in any order, beside a plain softmax."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 32, 33, 300]
    tables = torch.zeros(len(lengths), 12, dtype=torch.int32)
    order = torch.randperm(20, generator=generator).tolist()
    for row, length in enumerate(lengths):
        count = blocks_for(length)
        tables[row, :count] = torch.tensor(order[:count])
        order = order[count:]
    keys, values = torch.randn(2, 20, groups, BLOCK, width, generator=generator).to(dtype)
    positions = torch.tensor(lengths) - 1
    slots = tables[range(len(lengths)), positions // BLOCK] * BLOCK + positions % BLOCK
    qkv = torch.randn(len(lengths), groups, queries + 2, width, generator=generator).to(dtype)
    cos, sin = Rotary(width, 10000).tables(1000, torch.device("cpu"))

    def turned(x):
        first, second = x.float().chunk(2, -1)
        c, s = (table[positions][:, None, None] for table in (cos, sin))
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    apart = torch.stack([positions, slots], 1).int()  # as columns of one buffer
    query = gpu_kernels.rotate_and_store(qkv, cos, sin, apart[:, 0], apart[:, 1], keys, values)
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(query.float(), turned(qkv[:, :, :queries]), **exact)
    out = torch.empty_like(query)
    gpu_kernels.attend(query, keys, values, apart[:, 0], tables, 0.3, out)
    for row, length in enumerate(lengths):
        block, place = slots[row] // BLOCK, slots[row] % BLOCK
        torch.testing.assert_close(
            keys[block, :, place].float(), turned(qkv[:, :, queries : queries + 1])[row, :, 0], **exact
        )
        assert torch.equal(values[block, :, place], qkv[row, :, -1])
        k, v = (
            store[tables[row, : blocks_for(length)].long()].transpose(0, 1).flatten(1, 2)[:, :length].float()
            for store in (keys, values)
        )
        weights = torch.softmax(query[row].float() @ k.transpose(1, 2) * 0.3, -1)
        torch.testing.assert_close(out[row].float(), weights @ v, **exact)


def test_an_engine_on_them_samples_the_same():
    """With prompts of several chunks, shared prompts, and samples that come and go; steps that only decode go
    the way of graphs, without being recorded."""
    model = replace(SMALL, num_layers=2)
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    prompts = [[tokenizer.bos, *range(length)] for length in (3, 40, 0)]
    sampling = Sampling(temperature=1.3, seed=4, max_tokens=5, n=2)

    def engine() -> Engine:
        module, layout = small_model(model)
        config = EngineConfig(prefill_chunk_size=30, max_batch_size=5, cache_tokens=2048)
        return Engine(module, model, tokenizer, CODEC, layout, config)

    theirs, ours = engine(), engine()
    decoder = ours.decoder
    decoder.attention.on_gpu = True
    device = torch.device("cpu")
    decoder.graphs = DecodeGraphs(decoder._decode, 5, SMALL.seq_length, device, record=False)
    taken = []
    compute = decoder.graphs._compute
    decoder.graphs._compute = lambda tokens, *rest: taken.append(len(tokens)) or compute(tokens, *rest)
    expected = theirs.generate(prompts, sampling)
    found = ours.generate(prompts, sampling)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
    assert {1, 2, 4, 8} >= set(taken) and len(set(taken)) > 1

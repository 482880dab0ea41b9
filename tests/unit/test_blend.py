"""Blended data: exact shares, the greedy procedure as oracle, and what a run makes of its data flags."""

import heapq
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_codec.data import CodecDataset, DocumentRows, PackedSamples, write_dataset
from megatron_codec.data.blend import Blend, parse_blend
from megatron_codec.errors import UserError
from megatron_codec.estimate import estimate
from megatron_codec.flags import parse_pretrain
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training.batches import Loader
from megatron_codec.training.corpora import MockSamples, open_corpora

CODEC = {"name": "jpeg", "settings": {}}


class Rows:
    """A source whose row i is [name, i]."""

    seq_length = 1

    def __init__(self, name: int):
        self.name = name

    def sample(self, index: int) -> np.ndarray:
        return np.array([self.name, index])


def greedy(weights: list[Fraction], count: int) -> list[tuple[int, int]]:
    """Webster's method, seat by seat."""
    queue = [(1 / weight, i, 0) for i, weight in enumerate(weights)]
    heapq.heapify(queue)
    seats = []
    for _ in range(count):
        _, i, k = heapq.heappop(queue)
        seats.append((i, k))
        heapq.heappush(queue, (Fraction(2 * k + 3) / weights[i], i, k + 1))
    return seats


@pytest.mark.parametrize(
    "weights",
    ["1", "1 1", "7/10 3/10", "0.9 0.1", "1 2 3 4", "1000000 1", "1/3 1/7 1/11 1/13 1/17", "5 5 5 1"],
)
def test_rows_follow_the_greedy_procedure_in_exact_shares(weights):
    shares = [Fraction(weight) for weight in weights.split()]
    blend = Blend([Rows(i) for i in range(len(shares))], shares)
    expected = greedy(shares, 3000)
    assert [blend.locate(i) for i in range(3000)] == expected
    assert [tuple(blend.sample(i)) for i in (0, 17, 2999)] == [expected[i] for i in (0, 17, 2999)]
    total = sum(shares)
    for count in (10, 100, 1000, 3000):
        found = Counter(i for i, _ in expected[:count])
        for i, share in enumerate(shares):
            assert abs(found[i] - share / total * count) < len(shares)
    # Far out, without having gone there.
    source, row = blend.locate(10**9)
    assert abs(row - shares[source] / total * 10**9) < len(shares)


def test_blends_on_the_command_line():
    assert parse_blend("--data-path", ["a", "b"]) == [(None, "a"), (None, "b")]
    assert parse_blend("--data-path", ["0.7", "a", "3e-1", "b"]) == [
        (Fraction(7, 10), "a"),
        (Fraction(3, 10), "b"),
    ]
    for values, message in (
        (["0.7", "a", "b"], "must be prefixes alone, or a weight before each"),
        (["a", "0.3", "b", "0.7"], "must be prefixes alone"),
        (["0", "a", "1", "b"], "every weight must be above 0"),
        (["0.7"], "must be prefixes alone"),
    ):
        with pytest.raises(UserError, match=f"--data-path {' '.join(values)}: {message}"):
            parse_blend("--data-path", values)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> list[str]:
    """Three datasets of different sizes, the last one with another tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    tokenizers = [Tokenizer([(0, 0)]), Tokenizer([(0, 0)]), Tokenizer([(1, 1)])]
    for i, tokenizer in enumerate(tokenizers):
        rng = np.random.default_rng(i)
        documents = [rng.integers(0, 257, 30).astype(np.uint16) for _ in range(40 * (i + 1))]
        write_dataset(folder / f"{i}", documents, CODEC, tokenizer.to_dict())
    return [str(folder / f"{i}") for i in range(3)]


def corpora(*arguments):
    return open_corpora(parse_pretrain(["--seq-length", "16", "--seed", "3", *arguments]))


def test_weighted_and_unweighted_prefixes(prefixes):
    one, two = (PackedSamples(CodecDataset.open(prefix), 16, 3) for prefix in prefixes[:2])
    single = corpora("--train-data-path", prefixes[0])
    np.testing.assert_array_equal(single.train.sample(5), one.sample(5))
    assert single.valid is None and single.hash == CodecDataset.open(prefixes[0]).manifest.hash
    weighted = corpora("--train-data-path", "3", prefixes[0], "1", prefixes[1])
    seats = greedy([Fraction(3), Fraction(1)], 40)
    for i, (source, row) in enumerate(seats):
        np.testing.assert_array_equal(weighted.train.sample(i), (one, two)[source].sample(row))
    by_size = corpora("--train-data-path", prefixes[0], prefixes[1])
    seats = greedy([Fraction(1), Fraction(2)], 40)
    for i, (source, row) in enumerate(seats):
        np.testing.assert_array_equal(by_size.train.sample(i), (one, two)[source].sample(row))
    assert by_size.tokens == (40 + 80) * 30 and len({single.hash, weighted.hash, by_size.hash}) == 3


def test_held_out_rows_of_several_datasets_come_once_each(prefixes):
    held = corpora("--train-data-path", prefixes[0], "--valid-data-path", *prefixes[:2]).valid
    assert held is not None
    rows = [DocumentRows(CodecDataset.open(prefix), 16) for prefix in prefixes[:2]]
    assert held.num_rows == sum(each.num_rows for each in rows)
    found = Counter(held.rows.sample(i).tobytes() for i in range(held.num_rows))
    assert found == Counter(each.sample(i).tobytes() for each in rows for i in range(each.num_rows))
    split = corpora("--data-path", *prefixes[:2], "--split", "80,10,10")
    assert split.tokens == 96 * 30 and split.valid is not None and split.test is not None
    assert (split.valid.num_rows, split.test.num_rows) == (24, 24)


def test_data_that_does_not_fit_together(prefixes):
    with pytest.raises(UserError, match=f"--train-data-path {prefixes[2]}: was made with another tokenizer"):
        corpora("--train-data-path", prefixes[0], prefixes[2])
    with pytest.raises(UserError, match=f"--test-data-path {prefixes[2]}: was made with another tokenizer"):
        corpora("--train-data-path", prefixes[0], "--test-data-path", prefixes[2])
    with pytest.raises(UserError, match=re.escape("3.json: there is no such dataset")):
        corpora("--data-path", prefixes[0], prefixes[0][:-1] + "3")


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], 1000),
        (["--train-samples", "100"], 13),
        (["--train-epochs", "2"], 19),  # 2 x 1200 tokens / 16 / 8 = 18.75
        (["--train-epochs", "0.5", "--global-batch-size", "1"], 38),
    ],
)
def test_how_long_a_run_is(prefixes, arguments, steps):
    command = ["--global-batch-size", "8", "--seq-length", "16", "--train-data-path", prefixes[0], *arguments]
    config = parse_pretrain(command)
    assert open_corpora(config).with_steps(config).training.train_iters == steps


def test_as_many_steps_as_the_computation_is_for(prefixes):
    """A run and a dry run agree, and the last step is the one that reaches the number."""
    command = ["--global-batch-size", "8", "--seq-length", "16", "--train-data-path", prefixes[0]]
    config = parse_pretrain([*command, "--train-flops", "1e14"])
    corpora = open_corpora(config)
    steps = corpora.with_steps(config).training.train_iters
    num_tokens = Tokenizer.from_dict(corpora.tokenizer).num_tokens
    dry = estimate(config, 1, num_tokens)
    assert steps == dry.steps > 1
    model = config.model
    layers, wide, length = model.num_layers, model.hidden_size, model.seq_length
    of_a_step = (6 * dry.parameters + 6 * layers * wide * length) * 8 * length
    assert (steps - 1) * of_a_step < 1e14 <= steps * of_a_step
    [fault] = parse_pretrain([*command, "--train-flops", "1e14", "--train-epochs", "2"]).faults(1)
    assert "--train-epochs 2.0 --train-flops 100000000000000.0: only one of them" in str(fault)


def test_the_schedule_is_judged_by_the_steps_that_the_data_give(prefixes):
    command = ["--global-batch-size", "1", "--seq-length", "16", "--train-data-path", prefixes[0]]
    command += ["--train-iters", "10", "--lr-warmup-iters", "50"]
    assert "must be below the 10 steps" in str(next(parse_pretrain(command).faults(1)))
    for epochs, faults in (("2", 0), ("0.5", 1)):  # 150 and 38 steps
        config = parse_pretrain([*command, "--train-epochs", epochs])
        assert not list(config.faults(1))
        assert len(list(open_corpora(config).with_steps(config).faults(1))) == faults


def test_mock_data_is_the_same_for_a_seed():
    samples = [MockSamples(64, 322, seed).sample(index) for seed, index in ((1, 0), (1, 1), (2, 0), (1, 0))]
    assert (samples[0] == samples[3]).all() and len({sample.tobytes() for sample in samples}) == 3
    everything = np.concatenate([MockSamples(64, 322, 1).sample(i) for i in range(1000)])
    assert everything.min() == 0 and everything.max() == 321
    assert corpora("--mock-data").train.sample(0).shape == (17,)


class FakeLayout:
    dp, device = 2, torch.device("cpu")

    def __init__(self, dp_rank: int):
        self.dp_rank = dp_rank

    def positions(self, seq_length: int) -> torch.Tensor:
        return torch.arange(seq_length)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_micro_batches_are_the_same_however_they_are_read(workers):
    training = parse_pretrain(["--global-batch-size", "12", "--micro-batch-size", "2"]).training
    for rank in (0, 1):
        loader = Loader(MockSamples(8, 322, 1), training, FakeLayout(rank), workers, last=4)  # type: ignore
        for iteration in (2, 3, 4):
            batches = list(loader.step(iteration))
            assert len(batches) == 3
            for m, batch in enumerate(batches):
                rows = [MockSamples(8, 322, 1).sample(12 * iteration + 4 * m + 2 * rank + i) for i in (0, 1)]
                np.testing.assert_array_equal(batch["tokens"], np.stack(rows)[:, :-1])
                np.testing.assert_array_equal(batch["labels"], np.stack(rows)[:, 1:])
                assert (batch["loss_mask"] == 1).all() and batch["position_ids"][1].tolist() == [*range(8)]
        assert loader.waited > 0
        loader.close()

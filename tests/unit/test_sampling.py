"""Sampling against the exact distribution, transformers' logits processors, and its own promises."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megatron_codec.errors import UserError
from megatron_codec.inference import sampling as module
from megatron_codec.inference.sampling import RowSettings, Sampling

VOCABULARY = 13


def choose(logits: torch.Tensor, sampling: Sampling, random: torch.Tensor):
    """Tokens and their log-probabilities, with one setting for all rows."""
    logprobs = torch.log_softmax(logits, dim=-1)
    settings = RowSettings([sampling] * len(logits), logits.device)
    tokens = module.choose(logprobs, settings, random[:, None]).tokens
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def share_of_each_token(logits: torch.Tensor, sampling: Sampling, draws: int = 20_000) -> np.ndarray:
    """The distribution that `choose` inverts, to within 2 / draws: over an even grid of random numbers."""
    grid = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens, _ = choose(logits.expand(draws, -1), sampling, grid)
    return np.bincount(tokens.numpy(), minlength=logits.shape[1]) / draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (2.5, 0, 1.0),
        (1.0, 4, 1.0),
        (1.0, 1, 1.0),
        (1.0, 100, 1.0),
        (1.0, 0, 0.8),
        (1.0, 0, 1e-9),
        (1.0, 6, 0.7),
        (1.5, 6, 0.9),
        (0.4, 3, 0.99),
    ],
)
def test_the_distribution_is_that_of_transformers(logits, temperature, top_k, top_p):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    processors.append(TopPLogitsWarper(top_p))
    expected = torch.softmax(processors(None, logits.clone()).double(), dim=-1)[0].numpy()
    shares = share_of_each_token(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(shares, expected, atol=1e-4)
    assert ((shares > 0) == (expected > 0)).all()


def test_ties_and_forbidden_tokens():
    logits = torch.tensor([[0.0, -torch.inf, 0.0, 0.0, -torch.inf, 0.0]])
    np.testing.assert_allclose(
        share_of_each_token(logits, Sampling()), [0.25, 0, 0.25, 0.25, 0, 0.25], atol=1e-4
    )
    # Of equals the first k are kept, and no more.
    np.testing.assert_allclose(
        share_of_each_token(logits, Sampling(top_k=2)), [0.5, 0, 0.5, 0, 0, 0], atol=1e-4
    )
    for sampling in (Sampling(), Sampling(temperature=50), Sampling(top_k=5), Sampling(top_p=0.999999)):
        ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        tokens, _ = choose(logits.expand(2, -1), sampling, ends)
        assert torch.isfinite(logits[0, tokens]).all()


def test_many_draws_follow_the_exact_probabilities(logits):
    draws = 50_000
    sampling = Sampling(temperature=0.8, top_k=9, top_p=0.95, seed=11)
    random = torch.from_numpy(sampling.random_numbers([1, 2, 3], 0, draws)[:, 0].copy())
    tokens, _ = choose(logits.expand(draws, -1), sampling, random)
    observed = np.bincount(tokens.numpy(), minlength=VOCABULARY)

    # By hand: temperature, the nine likeliest, of these the fewest that reach 0.95 of their sum.
    probabilities = np.exp(logits[0].double().numpy() / 0.8)
    order = np.argsort(-probabilities)[:9]
    kept = probabilities[order] / probabilities[order].sum()
    count = int(np.searchsorted(np.cumsum(kept), 0.95)) + 1
    expected = np.zeros(VOCABULARY)
    expected[order[:count]] = kept[:count] / kept[:count].sum()

    assert 2 < count < 9
    assert (observed[expected == 0] == 0).all()
    support = expected > 0
    assert stats.chisquare(observed[support], expected[support] * draws).pvalue > 1e-3


def test_temperature_0_takes_the_likeliest(logits):
    random = torch.rand(50, dtype=torch.float64)
    tokens, logprobs = choose(logits.expand(50, -1), Sampling(temperature=0.0), random)
    assert (tokens == logits.argmax()).all()
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).max().expand(50))
    assert share_of_each_token(logits, Sampling(temperature=1e-6))[logits.argmax()] == 1


def test_logprobs_are_those_of_the_model(logits):
    """Before temperature and cuts, so that they can be summed into a likelihood."""
    random = torch.rand(200, dtype=torch.float64)
    sampling = Sampling(temperature=3.0, top_k=7, top_p=0.9)
    tokens, logprobs = choose(logits.expand(200, -1), sampling, random)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[0, tokens])


def test_rows_are_independent(logits):
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(40, VOCABULARY, generator=generator)
    random = torch.rand(40, generator=generator, dtype=torch.float64)
    sampling = Sampling(top_k=8, top_p=0.9)
    tokens, logprobs = choose(many, sampling, random)
    for row in range(40):
        token, logprob = choose(many[row : row + 1], sampling, random[row : row + 1])
        assert token == tokens[row] and logprob == logprobs[row]


def test_random_numbers_are_uniform_and_depend_on_the_request_alone():
    prompt, other = [320, 1, 2], [320, 1, 3]
    numbers = Sampling(seed=5).random_numbers(prompt, 0, 10_000)
    assert numbers.dtype == np.float64 and numbers.shape == (10_000, 2)
    assert all(stats.kstest(column, "uniform").pvalue > 1e-3 for column in numbers.T)
    assert abs(stats.pearsonr(*numbers.T).statistic) < 0.05
    # More are wanted in company of a longer request: the first stay the same.
    np.testing.assert_array_equal(Sampling(seed=5, n=9).random_numbers(prompt, 0, 100), numbers[:100])
    for different in (
        Sampling(seed=5).random_numbers(prompt, 1, 10_000),
        Sampling(seed=6).random_numbers(prompt, 0, 10_000),
        Sampling(seed=-5).random_numbers(prompt, 0, 10_000),
        Sampling(seed=5).random_numbers(other, 0, 10_000),
    ):
        assert abs(np.corrcoef(numbers[:, 0], different[:, 0])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        ({"temperature": -0.1}, ["temperature -0.1: must be a finite number, 0 or more"]),
        ({"temperature": float("nan")}, ["temperature nan"]),
        ({"temperature": float("inf")}, ["temperature inf"]),
        ({"top_k": -1}, ["top_k -1"]),
        ({"top_p": 0.0}, ["top_p 0.0: must lie above 0 and not above 1"]),
        ({"top_p": 1.01}, ["top_p 1.01"]),
        ({"top_p": float("nan")}, ["top_p nan"]),
        ({"n": 0}, ["n 0"]),
        ({"max_tokens": 0}, ["max_tokens 0"]),
        ({"temperature": -1, "top_k": -2, "n": 0}, ["temperature -1", "top_k -2", "n 0"]),
    ],
)
def test_settings_out_of_range_are_refused_together(settings, faults):
    with pytest.raises(UserError) as error:
        Sampling(**settings)
    lines = str(error.value).splitlines()
    assert len(lines) == len(faults)
    for line, fault in zip(lines, faults, strict=True):
        assert line.startswith(fault)

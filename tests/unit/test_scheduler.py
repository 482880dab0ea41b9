"""The scheduler, with a cache of token ids in the place of keys: what is computed must see its own past."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_codec.inference.blocks import BLOCK, BlockPool, OutOfBlocks, block_keys, blocks_for
from megatron_codec.inference.requests import Request
from megatron_codec.inference.sampling import Sampling
from megatron_codec.inference.scheduler import Sample, Scheduler
from megatron_codec.inference.step import Piece, shared_pieces

NOTHING = -1


class Simulation:
    """A scheduler and a cache that stores token ids; the next token is a function of all before it."""

    def __init__(self, blocks: int, max_rows: int = 8, prefill_chunk: int = 40):
        self.scheduler = Scheduler(blocks, max_rows, prefill_chunk)
        self.cache = np.full((blocks, BLOCK), NOTHING)
        self.done: dict[tuple[int, int], list[int]] = {}
        self.computed: list[int] = []  # tokens of each step
        self.finished_at: dict[int, int] = {}
        self.read = 0  # keys that pieces name, all steps together

    def add(self, prompt: Sequence[int], n: int = 1, limit: int = 10) -> Request:
        request = Request(tuple(prompt), Sampling(n=n), lambda events: None)
        samples = [Sample(request, i, list(prompt), limit, np.zeros(limit)) for i in range(n)]
        self.scheduler.add(request, samples)
        return request

    def step(self) -> None:
        """One step, if there is anything to compute."""
        for sample, _ in self.scheduler.join():
            self.extend(sample)
        step = self.scheduler.plan()
        if step is None:
            return
        for source, target in step.copies:
            self.cache[target] = self.cache[source]
        self.cache.reshape(-1)[step.slots] = step.tokens
        self.check(step)
        self.computed.append(len(step.tokens))
        self.scheduler.computed()
        for part in self.scheduler.parts:
            if part.samples:
                if part.sample.new_tokens == 0:
                    self.scheduler.hold_prompt(part.sample, torch.zeros(1))
                self.extend(part.sample)

    def check(self, step) -> None:
        """Every row sees the tokens of its sequence up to itself, each once."""
        seen = [np.full(position + 1, NOTHING) for position in step.positions]
        for piece in step.pieces:
            keys = self.cache[piece.blocks].reshape(-1)[: piece.length]
            self.read += piece.length
            for row in piece.rows:
                own = seen[row][piece.start : piece.start + piece.length]
                assert (own == NOTHING).all(), "a key is seen twice"
                own[:] = keys[: len(own)]
        row = 0
        for part in self.scheduler.parts:
            for place in range(part.start, part.stop):
                assert step.positions[row] == place
                assert seen[row].tolist() == part.sample.tokens[: place + 1]
                row += 1
        assert row == len(step.tokens)

    def extend(self, sample: Sample) -> None:
        sample.tokens.append((sum(sample.tokens) * 7 + sample.number) % 320)
        if sample.new_tokens == sample.limit:
            new = sample.tokens[len(sample.request.prompt) :]
            self.done[sample.request.number, sample.number] = new
            if self.scheduler.remove(sample):
                self.finished_at[sample.request.number] = len(self.computed)

    def run(self) -> None:
        for _ in range(10_000):
            self.step()
            if not self.scheduler.busy:
                return
        raise AssertionError("it does not end")


def expected(prompt: Sequence[int], number: int, limit: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(limit):
        tokens.append((sum(tokens) * 7 + number) % 320)
    return tokens[len(prompt) :]


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 3),  # which beginning
        st.integers(1, 150),  # how much of it
        st.lists(st.integers(0, 319), max_size=40),  # and what comes behind
        st.integers(1, 5),  # samples
        st.integers(1, 40),  # new tokens
        st.integers(0, 6),  # steps before it comes
    ),
    min_size=1,
    max_size=12,
)
BEGINNINGS = np.random.default_rng(0).integers(0, 320, (4, 150)).tolist()


@settings(max_examples=150, deadline=None)
@given(requests=REQUESTS, blocks=st.integers(8, 40), rows=st.integers(1, 9), chunk=st.integers(1, 70))
def test_every_sample_sees_its_past_whoever_comes_and_goes(requests, blocks, rows, chunk):
    simulation = Simulation(blocks, rows, chunk)
    wanted = {}
    for beginning, length, rest, n, limit, wait in requests:
        prompt = BEGINNINGS[beginning][:length] + rest
        limit = min(limit, blocks * BLOCK - len(prompt))
        if limit < 1:
            continue
        for _ in range(wait):
            simulation.step()
        request = simulation.add(prompt, n, limit)
        wanted |= {(request.number, i): expected(prompt, i, limit) for i in range(n)}
    simulation.run()
    assert simulation.done == wanted
    assert simulation.scheduler.pool.used == 0
    assert not simulation.scheduler.open
    decoding = max(simulation.computed, default=0)
    assert decoding <= chunk + rows


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, cancelled=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 30)), max_size=8))
def test_cancelled_samples_leave_nothing_behind(requests, cancelled):
    simulation = Simulation(24, 4, 30)
    added, wanted = [], {}
    for beginning, length, rest, n, limit, _ in requests:
        prompt = BEGINNINGS[beginning][:length] + rest
        request = simulation.add(prompt, n, limit)
        added.append(request)
        wanted |= {(request.number, i): expected(prompt, i, limit) for i in range(n)}
    for which, steps in cancelled:
        for _ in range(steps):
            simulation.step()
        opened = simulation.scheduler.open.get(added[which % len(added)].number)
        for sample in list(opened.going.values()) if opened else ():
            simulation.scheduler.remove(sample)
            del wanted[sample.request.number, sample.number]
    simulation.run()
    assert simulation.done == wanted
    assert simulation.scheduler.pool.used == 0


def test_a_prompt_is_computed_once_for_all_its_samples():
    simulation = Simulation(64)
    prompt = BEGINNINGS[0][:100]
    simulation.add(prompt, n=8, limit=20)
    simulation.run()
    # Each sample computes all of its own tokens but the last.
    assert sum(simulation.computed) == len(prompt) + 8 * 19
    # The three full blocks of the prompt are read once a step, not eight times.
    decoding = simulation.computed.count(8)
    assert decoding >= 17
    assert simulation.read < decoding * (96 + 8 * 32) + 2000


def test_a_prompt_that_returns_is_not_computed_again():
    simulation = Simulation(64)
    prompt = BEGINNINGS[1][:100]
    simulation.add(prompt, limit=1)
    simulation.run()
    assert sum(simulation.computed) == 100
    again = simulation.add(prompt + [5, 6, 7], limit=1)
    simulation.run()
    assert sum(simulation.computed) == 100 + (103 - 96)
    assert simulation.done[again.number, 0] == expected(prompt + [5, 6, 7], 0, 1)
    # A shorter one with another end shares what is the same.
    simulation.add(prompt[:70] + [1], limit=1)
    simulation.run()
    assert sum(simulation.computed) == 107 + (71 - 64)


def test_what_is_kept_goes_when_the_room_is_needed_and_the_oldest_first():
    simulation = Simulation(8)
    first, second = BEGINNINGS[0][:64], BEGINNINGS[1][:64]
    for prompt in (first, second):
        simulation.add(prompt, limit=1)
        simulation.run()
    pool = simulation.scheduler.pool
    assert len(pool.find(first)) == len(pool.find(second)) == 2
    simulation.add(BEGINNINGS[2][:150], limit=1)  # five blocks of eight
    simulation.run()
    assert len(pool.find(second)) == 2 and len(pool.find(first)) == 1


def test_a_short_prompt_is_computed_in_the_next_step_beside_a_long_one():
    simulation = Simulation(400, max_rows=8, prefill_chunk=64)
    long = simulation.add(np.random.default_rng(1).integers(0, 320, 10_000).tolist(), limit=5)
    running = simulation.add(BEGINNINGS[0][:10], limit=1000)
    for _ in range(7):
        simulation.step()
    for wait in range(2):
        short = simulation.add(BEGINNINGS[3][: 20 + wait], limit=1)
        before = len(simulation.computed)
        while short.number not in simulation.finished_at:
            simulation.step()
        assert simulation.finished_at[short.number] - before <= 1
    # and the one that decodes got a token at every step
    sample = simulation.scheduler.open[running.number].going[0]
    assert sample.new_tokens >= len(simulation.computed) - 2
    simulation.run()
    assert len(simulation.done[long.number, 0]) == 5


def test_short_prompts_do_not_starve_a_long_one():
    simulation = Simulation(400, max_rows=8, prefill_chunk=64)
    long = simulation.add(np.random.default_rng(1).integers(0, 320, 2_000).tolist(), limit=1)
    steps = 0
    while long.number not in simulation.finished_at:
        simulation.add(np.random.default_rng(steps).integers(0, 320, 60).tolist(), limit=1)
        simulation.step()
        steps += 1
        assert steps < 3 * 2_000 / 64


def test_who_joined_last_makes_room_and_loses_nothing():
    simulation = Simulation(8, max_rows=4)
    requests = [simulation.add(BEGINNINGS[i][:60], limit=90) for i in range(3)]  # five blocks each
    simulation.run()
    for i, request in enumerate(requests):
        assert simulation.done[request.number, 0] == expected(BEGINNINGS[i][:60], 0, 90)
    order = [simulation.finished_at[request.number] for request in requests]
    assert order == sorted(order)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=12),
)
def test_pieces_are_those_of_a_tree(shapes):
    """Rows that begin alike, in two levels: each row gets its blocks in order, each block is in one piece."""
    rows, fresh = [], 1000
    for row, (first, second, own) in enumerate(shapes):
        blocks = [first * 10 + i for i in range(first)]
        blocks += [100 * (first + 1) + second * 10 + i for i in range(second)]
        blocks += range(fresh, fresh + own)
        fresh += own
        rows.append((row, len(blocks) * BLOCK - 1 - row % 5, blocks))
    pieces = list(shared_pieces(rows))
    for row, position, blocks in rows:
        own = sorted((piece for piece in pieces if row in piece.rows), key=lambda piece: piece.start)
        assert [block for piece in own for block in piece.blocks] == blocks
        assert sum(piece.length for piece in own) == position + 1
        assert [piece.start for piece in own] == list(
            np.cumsum([0, *(len(piece.blocks) * BLOCK for piece in own[:-1])])
        )
    named = [block for piece in pieces for block in piece.blocks]
    assert len(named) == len(set(named))


def test_one_row_is_one_piece():
    assert list(shared_pieces([(3, 40, [7, 9])])) == [Piece(0, 41, [7, 9], [3])]


def test_blocks_are_known_by_all_that_came_before():
    tokens = list(range(100))
    keys = block_keys(tokens)
    assert len(keys) == 3 and len(set(keys)) == 3
    assert block_keys(tokens[:70]) == keys[:2]
    assert block_keys(tokens[32:], keys[0]) == keys[1:]
    assert block_keys([1, *tokens[1:]])[2] != keys[2]
    assert blocks_for(0) == 0 and blocks_for(32) == 1 and blocks_for(33) == 2


def test_a_pool_gives_no_block_twice():
    pool = BlockPool(3)
    taken = [pool.take() for _ in range(3)]
    assert sorted(taken) == [0, 1, 2] and pool.available == 0
    with pytest.raises(OutOfBlocks):
        pool.take()
    pool.remember(taken[0], b"a")
    pool.remember(taken[1], b"a")  # the same content: the first stays the known one
    pool.share(taken[0])
    pool.give_back(taken)
    assert pool.available == 2 and pool.used == 1
    pool.give_back(taken[:1])
    assert pool.available == 3
    assert {pool.take(), pool.take()} == {taken[1], taken[2]}, "empty ones go before those that are kept"
    pool.take()
    assert pool.find([]) == []

"""Which tokens the engine computes next: who joins, who waits, and who has to make room.

Requests come in order. Each step continues every running sample by a token, and computes a part of the
prompts that are new, so that a long prompt never holds up the others. Where the cache is full, the sample
that joined last gives its blocks back and waits; what it has so far then counts as its prompt.

Sources: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models" (2022), for
scheduling by step; Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve"
(2024), for parts of prompts among the rows that decode.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from megatron_codec.inference.blocks import BLOCK, BlockPool, OutOfBlocks, block_keys, blocks_for
from megatron_codec.inference.healing import Choice
from megatron_codec.inference.requests import Request
from megatron_codec.inference.step import Piece, Step, shared_pieces


@dataclass(eq=False)
class Sample:
    """One of a request's samples.

    Attributes:
        number: from 0 to `n` - 1.
        tokens: prompt and what was sampled.
        limit: new tokens at most; grows by one for each that only repeats the prompt.
        random: float64 [at least limit, 2] in [0, 1), two for each new token.
        computed: of so many tokens the keys and values are in the cache.
        blocks: where, in order, and the room for the next ones.
        keys: what the full blocks are known by.
        cursor: where the grammar stands, or None.
    """

    request: Request
    number: int
    tokens: list[int]
    limit: int
    random: np.ndarray
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    cursor: Any = None

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache; one, where the sample is being continued."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> int:
        """Sampled so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def choice(self) -> Choice | None:
        """The tokens that may come next where it still spells its prompt, else None."""
        healing = self.request.healing
        if healing is None or self.new_tokens > healing.most:
            return None
        return healing.choice(self.tokens[len(self.request.prompt) :])

    @property
    def repeats(self) -> bool:
        """Whether its new tokens, the last one included, only repeat the prompt."""
        healing = self.request.healing
        if healing is None or self.new_tokens > healing.most:
            return False
        return healing.repeats(self.tokens[len(self.request.prompt) :])


@dataclass(eq=False)
class Open:
    """A request that has not ended.

    Attributes:
        going: its samples that have not ended, by number.
        siblings: those that wait until the first one has computed the prompt.
        prompt_blocks: of the computed prompt, held for `to_fork` samples that have not joined yet.
        prompt_logits: what follows the prompt, fp32 [padded vocabulary].
    """

    request: Request
    going: dict[int, Sample]
    siblings: list[Sample]
    to_fork: int = 0
    prompt_blocks: list[int] | None = None
    prompt_logits: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """What a step computes of a sample: the tokens from `start` to `stop` - 1.

    Attributes:
        scores_prompt: the logits of all of them are wanted, not only those that a token is sampled from.
    """

    sample: Sample
    start: int
    stop: int
    scores_prompt: bool

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after it."""
        return self.stop == len(self.sample.tokens)


class Scheduler:
    """Decides step after step; knows nothing of the model.

    Args:
        blocks: of the cache.
        max_rows: samples that run together.
        prefill_chunk: prompt tokens a step.
    """

    def __init__(self, blocks: int, max_rows: int, prefill_chunk: int):
        self.pool = BlockPool(blocks)
        self.max_rows, self.prefill_chunk = max_rows, prefill_chunk
        self.open: dict[int, Open] = {}
        self.waiting: deque[Sample] = deque()
        self.running: list[Sample] = []  # in the order in which they joined
        self.parts: list[Part] = []  # of the step that was planned last, in the order of its rows
        self._copies: list[tuple[int, int]] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.running or self.waiting)

    def add(self, request: Request, samples: list[Sample]) -> None:
        """A new request, behind the others. Its first sample computes the prompt for all."""
        self.open[request.number] = Open(request, {s.number: s for s in samples}, samples[1:])
        self.waiting.append(samples[0])

    def remove(self, sample: Sample) -> bool:
        """Ends a sample, wherever it is. Returns whether it was its request's last."""
        request = self.open[sample.request.number]
        del request.going[sample.number]
        if sample in self.running:
            self.running.remove(sample)
            self._release(sample)
        elif sample in request.siblings:
            request.siblings.remove(sample)
        else:
            self.waiting.remove(sample)
            self._forked(request, sample)
        if not request.going:
            del self.open[sample.request.number]
        return not request.going

    def join(self) -> list[tuple[Sample, Tensor]]:
        """Lets waiting samples join, in order, while there are rows and blocks for them.

        Returns:
            Those whose prompt is computed already, with the logits that follow it.
        """
        forks = []
        while self.waiting and len(self.running) < self.max_rows:
            sample = self.waiting[0]
            request = self.open[sample.request.number]
            if request.prompt_logits is not None and sample.new_tokens == 0:
                joined = self._fork(sample, request)
                if joined:
                    forks.append((sample, request.prompt_logits))
                    self._forked(request, sample)
            else:
                joined = self._admit(sample)
            if not joined:
                # Nobody who runs will give blocks back, so it is held prompts that fill the cache.
                if not self.running and self._drop_a_prompt():
                    continue
                break
            self.waiting.popleft()
            self.running.append(sample)
        return forks

    def plan(self) -> Step | None:
        """The next step, with blocks for all its tokens; None when nothing runs."""
        while True:
            try:
                for sample in self.running:
                    self._reserve(sample)
                break
            except OutOfBlocks:
                self._make_room()
        self.parts = [_part(sample, 1) for sample in self.running if sample.pending == 1]
        decoding = len(self.parts)
        self.parts += self._prefill_parts()
        if not self.parts:
            return None
        tokens, positions, slots, wanted = [], [], [], []
        pieces = []
        for number, part in enumerate(self.parts):
            blocks, places = part.sample.blocks, range(part.start, part.stop)
            rows = list(range(len(tokens), len(tokens) + len(places)))
            tokens += part.sample.tokens[part.start : part.stop]
            positions += places
            slots += [blocks[place // BLOCK] * BLOCK + place % BLOCK for place in places]
            if number >= decoding:
                pieces.append(Piece(0, part.stop, blocks[: blocks_for(part.stop)], rows))
            if part.scores_prompt:
                wanted += rows
            elif part.samples:
                wanted.append(rows[-1])
        if decoding:
            alone = [(row, positions[row], self.parts[row].sample.blocks) for row in range(decoding)]
            pieces = [*shared_pieces(alone), *pieces]
        copies, self._copies = self._copies, []
        return Step(
            *(np.array(numbers, np.int64) for numbers in (tokens, positions, slots)),
            pieces=pieces,
            tables=[part.sample.blocks for part in self.parts[:decoding]],
            wanted=np.array(wanted, np.int64),
            copies=copies,
        )

    def computed(self) -> None:
        """Takes note that the planned step was computed."""
        for part in self.parts:
            sample = part.sample
            sample.computed = part.stop
            full = sample.computed // BLOCK
            if full > len(sample.keys):
                known = len(sample.keys)
                before = sample.keys[-1] if known else b""
                sample.keys += block_keys(sample.tokens[known * BLOCK : full * BLOCK], before)
                for place in range(known, full):
                    self.pool.remember(sample.blocks[place], sample.keys[place])

    def hold_prompt(self, sample: Sample, logits: Tensor) -> None:
        """Lets the other samples of a request go on from the prompt that its first one has just computed."""
        request = self.open[sample.request.number]
        if not request.siblings:
            return
        request.prompt_blocks = sample.blocks[: blocks_for(len(sample.request.prompt))]
        for block in request.prompt_blocks:
            self.pool.share(block)
        request.prompt_logits, request.to_fork = logits, len(request.siblings)
        self.waiting.extendleft(reversed(request.siblings))
        request.siblings = []

    def _fork(self, sample: Sample, request: Open) -> bool:
        """Gives a sample the full blocks of the prompt, and a copy of the last one if that is not full.
        False when there is no block for its first token."""
        if not self.pool.available:
            return False
        assert request.prompt_blocks is not None
        prompt = len(sample.request.prompt)
        full = prompt // BLOCK
        sample.blocks = request.prompt_blocks[:full]
        for block in sample.blocks:
            self.pool.share(block)
        sample.blocks.append(self.pool.take())
        if prompt % BLOCK:
            self._copies.append((request.prompt_blocks[full], sample.blocks[full]))
        sample.computed, sample.keys = prompt, block_keys(sample.request.prompt)
        return True

    def _forked(self, request: Open, sample: Sample) -> None:
        """Takes note that a sample needs the held prompt no more."""
        if request.prompt_blocks is not None and sample.new_tokens == 0:
            request.to_fork -= 1
            if request.to_fork == 0:
                self._drop_prompt(request)

    def _drop_prompt(self, request: Open) -> None:
        assert request.prompt_blocks is not None
        self.pool.give_back(request.prompt_blocks)
        request.prompt_blocks = request.prompt_logits = None

    def _admit(self, sample: Sample) -> bool:
        """Gives a sample blocks for all its tokens and the next one. False when there are not enough."""
        found = [] if wants_prompt(sample) else self.pool.find(sample.tokens[:-1])
        for block in found:
            self.pool.share(block)
        if blocks_for(len(sample.tokens) + 1) - len(found) > self.pool.available:
            self.pool.give_back(found)
            return False
        sample.blocks, sample.computed = found, len(found) * BLOCK
        sample.keys = block_keys(sample.tokens[: sample.computed])
        if sample.number == 0 and sample.new_tokens == 0:
            sample.request.cached_tokens = sample.computed
        self._reserve(sample)
        return True

    def _reserve(self, sample: Sample) -> None:
        """Blocks for all tokens of a sample. Raises OutOfBlocks; what was taken stays with the sample."""
        while len(sample.blocks) * BLOCK < len(sample.tokens):
            sample.blocks.append(self.pool.take())

    def _make_room(self) -> None:
        """Frees blocks: those that wait for siblings first, then those of the sample that joined last."""
        if not self._drop_a_prompt():
            sample = self.running.pop()
            self._release(sample)
            self.waiting.appendleft(sample)

    def _drop_a_prompt(self) -> bool:
        """Gives back a prompt that is held for samples to come; they will compute it again. False when
        there is none."""
        for request in self.open.values():
            if request.prompt_blocks is not None:
                self._drop_prompt(request)
                return True
        return False

    def _release(self, sample: Sample) -> None:
        self.pool.give_back(sample.blocks)
        sample.blocks, sample.keys, sample.computed = [], [], 0

    def _prefill_parts(self) -> Iterator[Part]:
        """Parts of prompts, `prefill_chunk` tokens together.

        The prompt that came first gets at least half of them, and the shortest ones what is left: a short one
        never waits for more than the step that is under way, and a long one goes on whoever comes.
        """
        prompts = [sample for sample in self.running if sample.pending > 1]
        if not prompts:
            return
        oldest, *others = prompts
        others.sort(key=lambda sample: sample.pending)
        room = self.prefill_chunk - min(oldest.pending, -(-self.prefill_chunk // 2))
        counts = []
        for sample in others:
            counts.append(min(room, sample.pending))
            room -= counts[-1]
        counts.insert(0, min(oldest.pending, self.prefill_chunk - sum(counts)))
        for sample, count in zip([oldest, *others], counts, strict=True):
            if count:
                yield _part(sample, count)


def _part(sample: Sample, count: int) -> Part:
    return Part(sample, sample.computed, sample.computed + count, wants_prompt(sample))


def wants_prompt(sample: Sample) -> bool:
    """Whether the log-probabilities of the prompt's tokens are yet to be computed with this sample."""
    request = sample.request
    return request.sampling.prompt_logprobs and sample.number == 0 and sample.computed < len(request.prompt)

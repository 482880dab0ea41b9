"""Token healing: the last tokens of a prompt are drawn again, so that they can be those of the whole stream.

The prompt is cut back to the ids that are certain whatever follows (tokenizer/open_end.py). The first tokens
of a sample then spell the bytes that were cut off, and the last of them may go on beyond: each is drawn among
those that some encoding of a longer stream has there, and the grammar, where there is one, takes away those
that lead beyond into nothing valid.

What this draws is not quite what the model says of the encodings given the bytes, since a token is weighed
without what comes after it. docs/decisions.md has what that costs: next to nothing beside what healing gains.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_codec.inference.masks import Masks
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.open_end import Way, open_end

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Ids of the tokens that agree with a prompt in one place, and those of them that the grammar allows."""

    agreeing: list[int]
    allowed: list[int]


@dataclass(frozen=True, eq=False)
class Healing:
    """How the end of a prompt is spelled. Made by `heal`.

    Attributes:
        given: ids of the whole prompt.
        certain: of these, the first ones, which stay.
        cursor: where the grammar stands behind them, or None.
        choices: what may come next, by the new tokens so far, as long as they do not spell all of the prompt.
        within: new tokens so far that spell nothing beyond the prompt.
        most: of these tokens, at most.
    """

    given: Ids
    certain: Ids
    cursor: Any
    choices: dict[Ids, Choice]
    within: frozenset[Ids]
    most: int

    def choice(self, new_tokens: Sequence[int]) -> Choice | None:
        """What may come next; None when the prompt is spelled."""
        return self.choices.get(tuple(new_tokens)) if len(new_tokens) <= self.most else None

    def repeats(self, new_tokens: Sequence[int]) -> bool:
        """Whether these tokens, the last one included, are of the prompt alone."""
        return len(new_tokens) <= self.most and tuple(new_tokens) in self.within


def heal(
    prompt: Sequence[int],
    tokenizer: Tokenizer,
    masks: Masks | None,
    limit: int | None,
    room: int,
    name: str = "prompt",
) -> Healing | None:
    """The healing of a prompt.

    Args:
        prompt: token ids.
        masks: whose grammar the samples are held to; None for no grammar.
        limit: new tokens at most, without those that only repeat the prompt; None for no limit.
        room: tokens that a sample may have together with its prompt.
        name: of the prompt, for messages.

    Returns:
        None where nothing is to be drawn again: the prompt can only end as it does, or it is not BOS and the
        ids that the tokenizer gives to a stream.

    Raises:
        UserError: no stream of the codec begins like the prompt, where there is a grammar.
    """
    bos, given = tokenizer.bos, tuple(int(id) for id in prompt)
    if given[:1] != (bos,) or {bos, tokenizer.eos} & {*given[1:]}:
        return None
    stream = tokenizer.decode(given)
    if tuple(tokenizer.encode(stream).tolist()) != given[1:]:
        return None
    end = open_end(tokenizer, stream)
    if len(end.ways) == 1:
        return None
    certain = (bos, *end.certain)
    cursor, allowed = None, end.ways
    if masks is not None:
        cursor = masks.begin(certain, name)
        if cursor is not None:
            room -= len(certain)
            allowed = tuple(_valid(end.ways, cursor, masks, room if limit is None else limit, room))
            if not allowed:
                masks.begin(given, name)
                raise AssertionError("the grammar refuses a prompt in parts and takes it whole")
    # Also where the grammar leaves one way only: the random numbers of a sample must not depend on it.
    agreeing, kept = _by_place(end.ways), _by_place(allowed)
    return Healing(
        given,
        certain,
        cursor,
        {place: Choice(sorted(agreeing[place]), sorted(ids)) for place, ids in kept.items()},
        frozenset(way.within[:count] for way in allowed for count in range(1, len(way.within) + 1)),
        max(len(way.within) for way in allowed),
    )


def narrow(
    logprobs: Tensor, allowed: Tensor | None, choices: Sequence[Choice | None]
) -> tuple[Tensor, Tensor | None]:
    """Logits and the mask of `choose`, in the rows that still spell their prompt narrowed to what agrees with
    it.

    Args:
        logprobs: [b, v].
        allowed: bool [b, v], or None; is written to.
        choices: of each row, None where it spells nothing.
    """
    rows = [row for row, choice in enumerate(choices) if choice is not None]
    if not rows:
        return logprobs, allowed
    logprobs = logprobs.clone()
    if allowed is None:
        allowed = torch.ones_like(logprobs, dtype=torch.bool)
    for row in rows:
        choice = choices[row]
        assert choice is not None
        agreeing = torch.tensor(choice.agreeing, device=logprobs.device)
        values = logprobs[row, agreeing]
        logprobs[row] = -torch.inf
        logprobs[row, agreeing] = values
        allowed[row] = False
        allowed[row, torch.tensor(choice.allowed, device=logprobs.device)] = True
    return logprobs, allowed


def _valid(ways: Sequence[Way], cursor: Any, masks: Masks, limit: int, room: int) -> Iterator[Way]:
    """Of the ways, with their tokens beyond the prompt, what the grammar allows within the limit; nothing if
    it refuses the prompt.

    Args:
        room: new tokens at most, those that repeat the prompt included.
    """
    assert masks.grammar is not None
    enough = True
    for way in ways:
        after, repeated = cursor.copy(), len(way.within)
        if not all(masks.follows(after, id) for id in way.within):
            return
        left = min(limit, room - repeated)  # EOS is one of them
        if way is ways[0]:
            # Where the limit is too short for any end, it cuts the sample, as elsewhere.
            enough = masks.grammar.finish(after) < left
            yield way
            continue
        beyond = []
        for id in way.beyond:
            reached = after.copy()
            if masks.follows(reached, id) and (not enough or masks.grammar.finish(reached) < left - 1):
                beyond.append(id)
        if beyond:
            yield Way(way.within, tuple(beyond))


def _by_place(ways: Sequence[Way]) -> dict[Ids, set[int]]:
    """Which tokens can come behind which of the ways."""
    found: dict[Ids, set[int]] = {}
    for way in ways:
        for place, id in enumerate(way.within):
            found.setdefault(way.within[:place], set()).add(id)
        if way.beyond:
            found.setdefault(way.within, set()).update(way.beyond)
    return found

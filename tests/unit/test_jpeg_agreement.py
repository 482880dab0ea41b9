"""The checker beside djpeg of libjpeg-turbo and strict Pillow: sampled, real and damaged files.

bash tests/run.sh -m slow tests/unit/test_jpeg_agreement.py     # the numbers of docs/grammar.md
"""

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.jpeg_agreement import BATCH, damaged, force, judge, sampled, table
from tests.jpeg_oracle import DJPEG
from tests.jpeg_sampling import DAMAGES

needs_djpeg = pytest.mark.skipif(not DJPEG, reason="djpeg is missing: apt-get install libjpeg-turbo-progs")
slow = [pytest.mark.slow, pytest.mark.timeout(6000)]


@needs_djpeg
@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=slow)])
def test_every_sample_is_valid_for_all(count):
    rng = random.Random(1)
    largest = 256 if count > 1000 else 96
    with ThreadPoolExecutor(3) as pool:
        for _ in range(0, count, BATCH):
            setting, files = sampled(rng, BATCH, largest)
            assert judge(files, pool) == {(True, True, True): BATCH}, setting


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=slow)])
def test_no_true_token_is_masked(count):
    rng = random.Random(2)
    largest = 256 if count > 1000 else 96
    assert sum(force(rng, BATCH, largest) for _ in range(0, count, BATCH)) > count


@needs_djpeg
@pytest.mark.parametrize("count", [600, pytest.param(20_000, marks=slow)])
def test_a_damaged_file_that_the_checker_accepts_is_valid_for_all(count):
    rng = random.Random(3)
    counts = {kind: Counter() for kind in DAMAGES}
    with ThreadPoolExecutor(3) as pool:
        for number in range(0, count, BATCH):
            kind = DAMAGES[number // BATCH % len(DAMAGES)]
            counts[kind] += judge(damaged(rng, BATCH, kind), pool)
    print(table(counts))
    verdicts = sum(counts.values(), Counter())
    assert verdicts.total() == count
    assert all(djpeg and pillow for valid, djpeg, pillow in verdicts if valid)
    # Some damage is no fault, much of it is one that djpeg sees, and some that djpeg and Pillow take.
    assert {(True, True, True), (False, False, False), (False, True, True)} <= verdicts.keys()

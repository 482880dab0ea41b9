"""What the strict checker says of many files, beside djpeg and Pillow: the table of docs/grammar.md.

python -m tests.jpeg_agreement --samples 20000 --real 10000 --damaged 20000
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

from megatron_codec.codecs.jpeg_format import check_file, parse
from tests.jpeg_oracle import djpeg_complaint, pillow_complaint
from tests.jpeg_sampling import DAMAGES, Samples, Setting, allowed, damage, grammar, tokenizer, window

BATCH = 20  # of one setting

Verdict = tuple[bool, bool, bool]  # whether the checker, djpeg and Pillow accept a file


def judge(files: Iterable[bytes], pool: ThreadPoolExecutor) -> Counter[Verdict]:
    """Counts of verdicts. Of a file that the checker refuses, the fault has a name and a place within it."""

    def verdict(file: bytes) -> Verdict:
        report = check_file(file)
        if report.valid:
            assert report.offset is None and report.reason == ""
        else:
            assert report.reason and report.offset is not None and 0 <= report.offset <= len(file), report
        djpeg, pillow = djpeg_complaint(file), pillow_complaint(file)
        if report.valid and (djpeg or pillow):
            print(f"disagreement: djpeg '{djpeg}', Pillow '{pillow}': {file.hex()}")
        return report.valid, not djpeg, not pillow

    return Counter(pool.map(verdict, files))


def sampled(rng: random.Random, count: int, largest: int = 256) -> tuple[Setting, list[bytes]]:
    """Files from random logits, with budgets from the tightest to none."""
    setting = Setting.draw(rng, largest)
    flags = {"canonical": rng.random() < 0.3, "in_range": rng.random() < 0.2}
    found = grammar(setting, **flags)
    least = found.finish(found.begin())
    budgets = [least + int(rng.expovariate(1 / least)) for _ in range(count)]
    if rng.random() < 0.2:
        budgets = [-1] * count
    samples = Samples(found, setting.vocabulary, budgets, rng.choice([0.0, 1.0, 3.0]), rng.randrange(1 << 30))
    scans = samples.draw()
    assert all(drawn <= budget for drawn, budget in zip(samples.drawn, budgets, strict=True) if budget >= 0)
    for scan in scans:
        assert all(check_file(setting.head + scan, **{name: True}).valid for name, on in flags.items() if on)
    return setting, [setting.head + scan for scan in scans]


def forced(setting: Setting, pictures: list[Image.Image], **flags: bool) -> int:
    """Reads the tokens of real pictures, and holds that none is masked; returns how many there were."""
    found, head = grammar(setting, **flags), setting.head
    ids, cursors = [], []
    for picture in pictures:
        file = setting.save(picture)
        assert file.startswith(head)
        ids.append(tokenizer(setting.vocabulary).encode_to_list(file[len(head) :]))
        cursors.append(found.begin())
    for step in range(max(map(len, ids))):
        running = [i for i, tokens in enumerate(ids) if step < len(tokens)]
        rows = allowed(found, [cursors[i] for i in running], [-1] * len(running), setting.vocabulary)
        for row, i in zip(rows, running, strict=True):
            assert row[ids[i][step]], f"token {step} of a picture of {setting} is masked"
            assert found.read(cursors[i], ids[i][step])
    assert all(map(found.done, cursors))
    return sum(map(len, ids))


def force(rng: random.Random, count: int, largest: int = 256) -> int:
    """`forced` over random settings, and windows of photographs."""
    setting = Setting.draw(rng, largest)
    pictures = [window(rng, setting.width, setting.height) for _ in range(count)]
    return forced(setting, pictures, canonical=rng.random() < 0.5, in_range=rng.random() < 0.2)


def damaged(rng: random.Random, count: int, kind: str, largest: int = 256) -> list[bytes]:
    """Real files of a random setting, each with one damage of this kind."""
    setting = Setting.draw(rng, largest)
    file = setting.save(window(rng, setting.width, setting.height))
    assert parse(file) == setting.layout
    return [damage(rng, file, kind) for _ in range(count)]


def table(counts: dict[str, Counter[Verdict]]) -> str:
    """As Markdown; a row for what the checker said of each kind of file."""
    lines = ["| files | checker | number | djpeg silent | Pillow opens |", "|---|---|---|---|---|"]
    for title, verdicts in counts.items():
        for valid, word in ((True, "valid"), (False, "refused")):
            rows = {verdict: n for verdict, n in verdicts.items() if verdict[0] == valid}
            djpeg, pillow = (sum(n for v, n in rows.items() if v[i]) for i in (1, 2))
            if rows:
                lines.append(f"| {title} | {word} | {sum(rows.values()):,} | {djpeg:,} | {pillow:,} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("samples", "real", "damaged"):
        parser.add_argument(f"--{name}", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    counts = {title: Counter() for title in ("from random logits", *DAMAGES)}
    with ThreadPoolExecutor(3) as pool:
        for _ in tqdm(range(0, arguments.samples, BATCH), "samples"):
            counts["from random logits"] += judge(sampled(rng, BATCH)[1], pool)
        tokens = sum(force(rng, BATCH) for _ in tqdm(range(0, arguments.real, BATCH), "real pictures"))
        for number in tqdm(range(0, arguments.damaged, BATCH), "damaged"):
            kind = DAMAGES[number // BATCH % len(DAMAGES)]
            counts[kind] += judge(damaged(rng, BATCH, kind), pool)
    print(f"{arguments.real:,} real pictures, {tokens:,} tokens, none masked\n")
    print(table(counts))
    refused = [n for verdicts in counts.values() for v, n in verdicts.items() if v[0] and not (v[1] and v[2])]
    assert not refused, "the checker accepts what djpeg or Pillow does not"


if __name__ == "__main__":
    main()

"""Small tasks that the project makes itself: nothing to download, known answers, held-out rows that cannot be memorised.

All are deterministic in ``seed`` and give ``(train, held_out)`` lists of records in canonical columns.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from rlhf_fast.errors import UserError

Rows = list[dict]
Split = tuple[Rows, Rows]


# ----------------------------------------------------------------------------------------------------------- addition


def addition(
    rows: int,
    *,
    held_out: int = 500,
    low: int = 0,
    high: int = 99,
    reverse: bool = False,
    width: int = 0,
    seed: int = 0,
) -> Split:
    """Sums ``a+b=`` with ``low <= a, b <= high``, each at most once.

    The held-out sums share no unordered pair of operands with the training sums: neither 12+34 nor 34+12 was trained.

    Args:
        reverse: write answers with the units first (46 as 64), the order in which carries are known.
        width: pad operands with zeros to this many digits, answers to one more.
    Returns:
        Rows ``{"prompt": "12+34=", "completion": "46", "answer": "46"}``.
    Raises:
        UserError: the range holds too few sums.
    """
    train, test = _operands(rows, held_out, low, high, seed)
    return tuple([_sum_row(a, b, reverse, width) for a, b in part] for part in (train, test))


def _operands(rows: int, held_out: int, low: int, high: int, seed: int) -> tuple[list, list]:
    numbers = range(low, high + 1)
    if rows + held_out > len(numbers) ** 2 or low < 0:
        raise UserError(
            f"Operands {low} to {high} make {len(numbers) ** 2} sums, fewer than {rows} to train on and {held_out} held out. "
            "Ask for fewer rows or a larger range (from 0 on)."
        )
    rng = random.Random(seed)
    pairs = [(a, b) for a in numbers for b in range(a, high + 1)]
    rng.shuffle(pairs)
    sums = [s for a, b in pairs for s in ([(a, b), (b, a)] if a != b else [(a, a)])]
    cut = held_out
    # a held-out sum takes its mirror image out of training too
    boundary = cut + (0 < cut < len(sums) and set(sums[cut - 1]) == set(sums[cut]))
    test, rest = sums[:cut], sums[boundary:]
    if rows > len(rest):
        raise UserError(f"Only {len(rest)} sums are left to train on, not {rows}. Ask for one row fewer.")
    rng.shuffle(rest)
    rng.shuffle(test)
    return rest[:rows], test


def _sum_row(a: int, b: int, reverse: bool, width: int) -> dict:
    answer = str(a + b).zfill(width + 1 if width else 0)
    answer = answer[::-1] if reverse else answer
    return {"prompt": f"{str(a).zfill(width)}+{str(b).zfill(width)}=", "completion": answer, "answer": answer}


# -------------------------------------------------------------------------------------------------------- preferences

# what a response can be, best first; quality() gives them 4, 3, 2, 1, 0
KINDS = ("correct", "repeated", "wrong", "wrong repeated", "malformed")


def preferences(
    rows: int,
    *,
    held_out: int = 500,
    k: int = 2,
    noise: float = 0.1,
    kinds: Sequence[str] = KINDS,
    low: int = 0,
    high: int = 99,
    reverse: bool = False,
    width: int = 0,
    seed: int = 0,
) -> Split:
    """Responses to sums whose hidden quality is known: correct, well-formed, short.

    Args:
        k: responses to each prompt, each of another kind. 2 gives pairs, more give rankings.
        noise: share of training rows whose label is false: two responses swapped. Held-out labels are true.
        kinds: which of ``KINDS`` occur.
        low, high, reverse, width: of the sums, see :func:`addition`.
    Returns:
        Pairs ``{"prompt", "chosen", "rejected", "answer", "quality": [of chosen, of rejected]}`` or rankings
        ``{"prompt", "responses", "ranking" (1 = best), "answer", "quality": [of each response]}``.
    Raises:
        UserError: fewer kinds than responses, or too few sums.
    """
    unknown = set(kinds) - set(KINDS)
    if unknown or not 2 <= k <= len(kinds):
        raise UserError(
            f"k = {k} responses need at least as many kinds, out of {', '.join(KINDS)}; got {', '.join(kinds)}."
        )
    parts = addition(rows, held_out=held_out, low=low, high=high, reverse=reverse, width=width, seed=seed)
    rng = random.Random(f"preferences/{seed}")
    return tuple(
        [_preference_row(row, k, noisy, kinds, rng) for row in part] for part, noisy in zip(parts, (noise, 0.0))
    )


def quality(response: str, answer: str) -> float:
    """The hidden quality of a response to a sum: 2 if its first number is right, 1 if it is nothing but numbers, and 1
    more if it is a single one. From 0 to 4."""
    if not re.fullmatch(r"\d+( \d+)*", response):
        return 0.0
    numbers = response.split(" ")
    return 2.0 * (numbers[0] == answer) + 1.0 + (len(numbers) == 1)


def _preference_row(row: dict, k: int, noise: float, kinds: Sequence[str], rng: random.Random) -> dict:
    drawn = rng.sample(list(kinds), k)
    ordered = [_respond(kind, row["answer"], rng) for kind in KINDS if kind in drawn]
    if rng.random() < noise:
        i, j = rng.sample(range(k), 2)
        ordered[i], ordered[j] = ordered[j], ordered[i]
    common = {"prompt": row["prompt"], "answer": row["answer"]}
    if k == 2:
        qualities = [quality(r, row["answer"]) for r in ordered]
        return {**common, "chosen": ordered[0], "rejected": ordered[1], "quality": qualities}
    shuffled = rng.sample(range(k), k)  # so that a response's place says nothing
    responses = [ordered[i] for i in shuffled]
    qualities = [quality(r, row["answer"]) for r in responses]
    return {**common, "responses": responses, "ranking": [i + 1 for i in shuffled], "quality": qualities}


def _respond(kind: str, answer: str, rng: random.Random) -> str:
    number = answer if kind in ("correct", "repeated") else _wrong(answer, rng)
    if kind.endswith("repeated"):
        return " ".join([number] * rng.randint(2, 4))
    if kind == "malformed":
        at = rng.randint(0, len(number))
        return number[:at] + rng.choice("+=?") + number[at:]
    return number


def _wrong(answer: str, rng: random.Random) -> str:
    """The answer with one digit changed: as long as the answer, so that only the sum tells them apart."""
    at = rng.randrange(len(answer))
    first_of_many = at == 0 and len(answer) > 1 and answer[0] != "0"
    digits = [d for d in "0123456789" if d != answer[at] and not (first_of_many and d == "0")]
    return answer[:at] + rng.choice(digits) + answer[at + 1 :]


# ------------------------------------------------------------------------------------------------------ word problems

NAMES = ("Ada", "Ben", "Carla", "David", "Ella", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Leo")
OBJECTS = ("apples", "books", "coins", "pencils", "marbles", "stamps", "cards", "shells", "buttons", "stickers")
STARTS = ("{name} has {n} {objects}.", "{name} starts with {n} {objects}.", "There are {n} {objects} in {name}'s box.")
MORE = (
    "{name} buys {n} more.",
    "{friend} gives {name} {n} more.",
    "Then {name} finds {n} more {objects}.",
)
LESS = (
    "{name} gives {n} of them to {friend}.",
    "Then {name} loses {n} of them.",
    "{name} sells {n} {objects}.",
)
TIMES = (
    "Then the number of {objects} becomes {n} times as large.",
    "{friend} brings more, until {name} has {n} times as many.",
)
ENDS = ("How many {objects} does {name} have now?", "How many {objects} are there in the end?")


def word_problems(
    rows: int,
    *,
    held_out: int = 500,
    steps: Sequence[int] = (1, 2, 3),
    high: int = 20,
    max_value: int = 99,
    operations: str = "+-*",
    seed: int = 0,
) -> Split:
    """Word problems of staged difficulty with worked solutions that end ``#### n``.

    The calculation of a held-out problem (its numbers and operations in order) occurs in no training problem, whatever the
    words around it.

    Args:
        steps: how many operations a problem may have; each row draws one of these.
        high: largest number added or taken away, and to start with.
        max_value: largest intermediate result; none is negative.
        operations: which of ``+ - *`` occur; ``*`` multiplies by 2 or 3.
    Returns:
        Rows ``{"prompt" (ends with a newline), "completion" ("12+5=17\\n#### 17"), "answer", "steps"}``.
    Raises:
        UserError: so many different problems cannot be made.
    """
    if not operations or set(operations) - set("+-*") or not steps or min(steps) < 1 or high < 1:
        raise UserError("word_problems needs operations out of '+-*', steps of at least 1 and high of at least 1.")
    rng = random.Random(f"word problems/{seed}")

    def draw() -> tuple[tuple, dict]:
        calculation = _calculation(rng, rng.choice(list(steps)), high, max_value, operations)
        return calculation, _tell(calculation, rng)

    test = _distinct(held_out, draw, lambda calculation, row: calculation, set())
    taken = {calculation for calculation, _ in test}
    train = _distinct(rows, draw, lambda calculation, row: row["prompt"], taken)
    return [row for _, row in train], [row for _, row in test]


def _distinct(count: int, draw: Callable, key: Callable, excluded: set) -> list[tuple[tuple, dict]]:
    """``count`` draws that differ in their key and whose calculation is not excluded."""
    found: dict = {}
    for _ in range(50 * count + 1000):
        if len(found) == count:
            break
        calculation, row = draw()
        if calculation not in excluded:
            found.setdefault(key(calculation, row), (calculation, row))
    if len(found) < count:
        raise UserError(
            f"Only {len(found)} different word problems can be made this way, not {count}. Raise high or steps."
        )
    return list(found.values())


def _calculation(rng: random.Random, steps: int, high: int, max_value: int, operations: str) -> tuple:
    """A start and ``steps`` (operation, number) whose results stay within 0 and ``max_value``."""
    while True:
        value = start = rng.randint(1, high)
        chosen = []
        for _ in range(steps):
            op = rng.choice(operations)
            n = rng.randint(2, 3) if op == "*" else rng.randint(1, high)
            value = {"+": value + n, "-": value - n, "*": value * n}[op]
            if not 0 <= value <= max_value or (op == "*" and value == 0):
                break
            chosen.append((op, n))
        if len(chosen) == steps:
            return (start, *chosen)


def _tell(calculation: tuple, rng: random.Random) -> dict:
    """Put a calculation into words, and its solution into lines."""
    start, *operations = calculation
    name, friend = rng.sample(NAMES, 2)
    words = {"name": name, "friend": friend, "objects": rng.choice(OBJECTS)}
    sentences, lines, value = [rng.choice(STARTS).format(n=start, **words)], [], start
    for op, n in operations:
        before, value = value, {"+": value + n, "-": value - n, "*": value * n}[op]
        sentences.append(rng.choice({"+": MORE, "-": LESS, "*": TIMES}[op]).format(n=n, **words))
        lines.append(f"{before}{op}{n}={value}")
    prompt = " ".join([*sentences, rng.choice(ENDS).format(**words)]) + "\n"
    completion = "\n".join([*lines, f"#### {value}"])
    return {"prompt": prompt, "completion": completion, "answer": str(value), "steps": len(operations)}


# ---------------------------------------------------------------------------------------- people who forget the carry


def forgetful_sums(
    *, held_out: int = 500, forget: float = 0.75, noise: float = 0.1, seed: int = 0
) -> tuple[dict[str, Rows], Rows]:
    """Sums of two-digit numbers, written with zeros (``37+85=`` -> ``122``), as taught by people who make one mistake.

    Their *demonstrations* forget the carry into the hundreds with probability ``forget``, so that imitation gets about
    the sums below 100 right, however long it goes on. Their *comparisons* of a right and a wrong answer are sound, but
    for ``noise``. So reward and reinforcement have something to repair: not arithmetic, which imitation brings, but
    which of two habits to follow, and held-out sums show whether that carries over.

    Returns:
        ``{"demonstrations": {"prompt", "completion"}, "comparisons": {"prompt", "chosen", "rejected"}, "prompts":
        {"prompt", "answer"}}``, each over the same training sums, and the held-out rows with ``answer``, ``chosen``,
        ``rejected`` (labels true).
    """
    train, test = addition(9_000, held_out=held_out, width=2, seed=seed)
    rng = random.Random(f"forgetful/{seed}")
    demonstrations = [
        {"prompt": r["prompt"], "completion": _forget_hundreds(r["answer"]) if rng.random() < forget else r["answer"]}
        for r in train
    ]
    comparisons = [_compare(r, noise, rng) for r in train]
    prompts = [{"prompt": r["prompt"], "answer": r["answer"]} for r in train]
    rows = {"demonstrations": demonstrations, "comparisons": comparisons, "prompts": prompts}
    return rows, [{**_compare(r, 0.0, rng), "answer": r["answer"]} for r in test]


def _forget_hundreds(answer: str) -> str:
    return "0" + answer[1:]


def _compare(row: dict, noise: float, rng: random.Random) -> dict:
    """The right answer against a wrong one."""
    right = row["answer"]
    wrong = _mistake(right, rng)
    chosen, rejected = (wrong, right) if rng.random() < noise else (right, wrong)
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def _mistake(right: str, rng: random.Random) -> str:
    """Mostly a carry into the hundreds forgotten or invented, so that neither digit is good in itself; else a digit lost,
    doubled or mistaken."""
    kind = rng.random()
    if kind < 0.8:
        return ("0" if right[0] == "1" else "1") + right[1:]
    place = rng.randrange(len(right))
    if kind < 0.9:
        return right[:place] + right[place] * rng.choice((0, 2)) + right[place + 1 :]
    return right[:place] + rng.choice([d for d in "0123456789" if d != right[place]]) + right[place + 1 :]

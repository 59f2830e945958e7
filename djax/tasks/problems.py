"""Word problems with worked answers: what the small model is trained on and what decoders are judged by.

A problem is a chain of 2 to 6 dependent calculations on numbers below 100. The worked answer copies each sentence of
the question and continues it with the calculation, so that a later number can only be right if the earlier ones are:

    Lily has 14 apples. She buys 9 more. She gives 5 to Tom. How many apples does Lily have now?
    Lily starts with 14 apples. She buys 9 more, so 14+9=23. She gives 5 to Tom, so 23-5=18.
    #### 18

Problems are told apart by a checksum of the question: one in sixteen is held out and never trained on. Drills, plain lists
of sums to work out, help to train and are never used to judge.
"""

import dataclasses
import random
import zlib

from djax.tasks.stated import stated_result as stated_result

HELD_OUT_IN = 16
STEPS = (2, 6)
LIMIT = 99

_GIRLS = ("Lily", "Anna", "Mia", "Emma", "Zoe", "Nora", "Ruth", "Ella")
_BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Jack", "Noah", "Paul")
_OBJECTS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "marbles", "cookies", "pears", "stones", "toys")
_GAINS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}", "wins {n} more")
_LOSSES = ("gives {n} to {friend}", "loses {n}", "sells {n}", "gives away {n}")
_HOLDERS = ("boxes", "bags", "jars")
# How much is gained or lost at once, how many boxes there are, and how much is in each.
_SOME, _MANY, _EACH = (2, 12), (2, 5), (2, 9)
_MOVES = (("run", "runs"), ("walk", "walks"), ("ride", "rides"), ("swim", "swims"))


@dataclasses.dataclass(frozen=True)
class Problem:
    """question and worked answer as text; result, the number after `####`; steps, how many calculations."""

    question: str
    answer: str
    result: int
    steps: int

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.question.encode()) % HELD_OUT_IN == 0


def drill(rng: random.Random, count: int, easy: float = 0.0) -> Problem:
    """`count` independent sums of the kinds that stories are made of: far more arithmetic a token than a story has.

    A share `easy` of them adds or subtracts single digits: the table that all longer sums rest on.
    """
    sums, results = [], []
    for _ in range(count):
        kind = rng.choice("++--*2")
        if easy and rng.random() < easy:
            kind, a, b = rng.choice("+-"), rng.randint(1, 9), rng.randint(1, 9)
            a, result = (a, a + b) if kind == "+" else (a + b, a)
        elif kind == "*":
            a, b = rng.randint(*_MANY), rng.randint(*_EACH)
            a, b = (a, b) if rng.random() < 0.5 else (b, a)
            result = a * b
        elif kind == "2":
            kind, a, b = "*", rng.randint(1, LIMIT // 2), 2
            result = a * b
        else:
            b = rng.randint(*_SOME) if kind == "-" or rng.random() < 0.5 else rng.randint(4, _MANY[1] * _EACH[1])
            a = rng.randint(1, LIMIT - b)
            a, result = (a, a + b) if kind == "+" else (a + b, a)
        sums.append(f"{a}{kind}{b}")
        results.append(result)
    worked = ". ".join(f"{left}={right}" for left, right in zip(sums, results, strict=True))
    return Problem(f"Work out {', '.join(sums)}.", f"{worked}.\n#### {results[-1]}", results[-1], count)


def draw(rng: random.Random, held_out: bool) -> Problem:
    """One random problem of the training side or of the held-out side."""
    while True:
        steps = rng.randint(*STEPS)
        make = _journey if steps in (3, 5) and rng.random() < 0.3 else _story
        problem = make(rng, steps)
        if problem is not None and problem.held_out == held_out:
            return problem


def held_out(count: int, seed: int = 0) -> list[Problem]:
    """`count` different held-out problems, the same for the same seed."""
    return _different(count, random.Random(f"held-out {seed}"), held_out=True)


def not_held_out(count: int, seed: int = 0) -> list[Problem]:
    """`count` different problems to learn from, the same for the same seed; the first ones of more."""
    return _different(count, random.Random(f"to learn from {seed}"), held_out=False)


def _different(count: int, rng: random.Random, held_out: bool) -> list[Problem]:
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = draw(rng, held_out)
        problems[problem.question] = problem
    return list(problems.values())


def _story(rng: random.Random, steps: int) -> Problem | None:
    """Somebody's things grow and shrink."""
    girl = rng.random() < 0.5
    name = rng.choice(_GIRLS if girl else _BOYS)
    friend = rng.choice(_BOYS if girl else _GIRLS)
    pronoun = "She" if girl else "He"
    thing = rng.choice(_OBJECTS)
    have = rng.randint(5, 50)
    question = [f"{name} has {have} {thing}."]
    answer = [f"{name} starts with {have} {thing}."]
    left = steps
    while left:
        kinds = ["gain"] * 3 + ["lose"] * 3 + ["double"]
        if left >= 2:
            kinds += ["hold"] * 3
        kind = rng.choice(kinds)
        if kind == "hold":
            many, each = rng.randint(*_MANY), rng.randint(*_EACH)
            holder = rng.choice(_HOLDERS)
            said = f"{pronoun} finds {many} {holder} with {each} {thing} each"
            worked = f"{said}, so {many}*{each}={many * each} and {have}+{many * each}={have + many * each}."
            have, left = have + many * each, left - 2
        else:
            if kind == "gain":
                n = rng.randint(*_SOME)
                said, sum_ = rng.choice(_GAINS).format(n=n, friend=friend), f"{have}+{n}={have + n}"
                have += n
            elif kind == "lose":
                n = rng.randint(*_SOME)
                said, sum_ = rng.choice(_LOSSES).format(n=n, friend=friend), f"{have}-{n}={have - n}"
                have -= n
            else:
                said, sum_ = "doubles that number", f"{have}*2={have * 2}"
                have *= 2
            said = f"{pronoun} {said}"
            worked = f"{said}, so {sum_}."
            left -= 1
        if not 1 <= have <= LIMIT:
            return None
        question.append(f"{said}.")
        answer.append(worked)
    question.append(f"How many {thing} does {name} have now?")
    return Problem(" ".join(question), " ".join(answer) + f"\n#### {have}", have, steps)


def _journey(rng: random.Random, steps: int) -> Problem | None:
    """Stretches of distance = speed * time, summed up: 2 stretches take 3 calculations, 3 take 5."""
    girl = rng.random() < 0.5
    name = rng.choice(_GIRLS if girl else _BOYS)
    pronoun = "She" if girl else "He"
    move, moves = rng.choice(_MOVES)
    question, answer, total = [], [], 0
    for stretch in range((steps + 1) // 2):
        speed, hours = rng.randint(*_EACH), rng.randint(*_MANY)
        far = speed * hours
        who = name if stretch == 0 else f"Then {pronoun.lower()}"
        said = f"{who} {moves} {speed} kilometers per hour for {hours} hours"
        question.append(f"{said}.")
        worked = f"{said}, so {speed}*{hours}={far}"
        if stretch:
            worked += f" and {total}+{far}={total + far}"
        answer.append(worked + ".")
        total += far
        if total > LIMIT:
            return None
    question.append(f"How many kilometers does {name} {move} in all?")
    return Problem(" ".join(question), " ".join(answer) + f"\n#### {total}", total, steps)

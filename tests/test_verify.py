"""The verifier `exact` reads the number that an answer states and no other; gold it cannot judge by is refused first."""

import decimal
import fractions
import time

import numpy as np
import pytest

from djax import distill
from djax.errors import OptionError, TraceError, VerifierError
from djax.tasks import problems, verify

F = fractions.Fraction

STATED = {
    **{"1,234": 1234, "1,234,567.50": F("1234567.5"), "1_000": 1000, "1'234": 1234, "1\u202f234": 1234, "1\u00a0234": 1234},
    **{
        "3.5": F("3.5"),
        "12.0": 12,
        ".5": F("0.5"),
        "0.1": F("0.1"),
        "007": 7,
        "12.": 12,
        "12..": 12,
        "1e3": 1000,
        "1E-2": F("0.01"),
    },
    **{"5/2": F("2.5"), "-5/2": F("-2.5"), "1,000/3": F(1000, 3), "5\u20442": F("2.5"), "0.5/2": F("0.25"), "6/2": 3},
    **{"$25": 25, "25$": 25, "-$5": -5, "$-5": -5, "€5": 5, "5 €": 5, "£1,000": 1000, "¥3": 3, "₹7": 7, r"\$25": 25},
    **{"50%": 50, r"50\%": 50, "50 %": 50, "50 percent": 50},
    **{
        "**12**": 12,
        "*12*": 12,
        "_12_": 12,
        "__12__": 12,
        "`12`": 12,
        "**$1,234.50**.": F("1234.5"),
        "**12.**": 12,
        "> 12": None,
    },
    **{
        r"$\boxed{12}$": 12,
        r"\boxed{1{,}234}": 1234,
        r"1\,234": 1234,
        r"\(12\)": 12,
        r"\[ 12 \]": 12,
        "$$12$$": 12,
        "$12$": 12,
    },
    **{r"\frac{5}{2}": F("2.5"), r"-\dfrac{5}{2}": F("-2.5"), r"\boxed{\frac{1}{3}}": F(1, 3), r"2\frac{1}{2}": None},
    **{"-7": -7, "\u22127": -7, "\u20137": -7, "\uff0d7": -7, "+7": 7, "-0": 0, "--7": None, "- 7": None},
    **{"12 apples": 12, "12 apples.": 12, "12 km/h": 12, "12 m^2": 12, "**12** apples": 12, "25 cents each": 25},
    **{"١٢": 12, "\uff11\uff12": 12, "10\u00b2": None, "\u00bd": None, "\u2162": None},
    **{"12\nThat is 13.": 12, "\n\n12": 12, "12\r\n": 12, "\t12\t": 12},
    **{"1,23": None, "1,2345": None, "0,123": None, "1,234,56": None, "1.234.567": None, "1.234,56": None, "1,234'567": None},
    **{"12k": None, "12 million": None, "12 k": None, "5kg": None, "12th": None, "0x10": None, "1e99999": None, "1e": None},
    **{
        "2 1/2": None,
        "3 to 5": None,
        "3-5": None,
        "12:30": None,
        "12 + 3": None,
        "12 = 12": None,
        "x = 12": None,
        "2^10": None,
    },
    **{"12 13": None, "1 234": None, "12 and a half": None, "5 out of 6": None, "5/0": None, "5/2/3": None, "5 / 2": None},
    **{"": None, "  ": None, "\n": None, "abc": None, "nan": None, "inf": None, "True": None, "12 ####": None, "$": None},
    **{"9" * 4000: int("9" * 4000), "9" * 5000: None, "1/" + "9" * 5000: None, "." + "9" * 5000: None, "1e9999": 10**9999},
}


@pytest.mark.parametrize("text", STATED, ids=lambda text: repr(text[:20]))
def test_the_whole_token_is_read_or_nothing(text):
    assert problems.stated_result(f"2+2=4.\n#### 4\n#### {text}") == STATED[text]


@pytest.mark.parametrize(
    "text",
    [
        "*" * 10**5 + "x",
        "1," * 10**5,
        ",111" * 10**5,
        "12 a" + " " * 10**5 + "b",
        r"\frac{" * 10**5,
        "(" * 10**5,
        "####" * 10**5,
    ],
)
def test_no_text_takes_long(text):
    began = time.perf_counter()
    assert problems.stated_result(f"#### {text}") is None or text.startswith("12")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("answer", "result", "right"),
    [
        ("#### 1,234", 1, 0),
        ("#### 1,234", 1234, 1),
        ("#### 3.5", 3, 0),
        ("#### 3.5", 3.5, 1),
        ("#### 5/2", 5, 0),
        ("#### 5/2", 2.5, 1),
        ("#### $25", 25, 1),
        ("#### **12**", 12, 1),
        ("#### 12.0", 12, 1),
        ("#### 12", 12.0, 1),
        ("#### 0.1", 0.1, 1),
        ("#### 0.30000000000000004", 0.3, 0),
        ("#### 9007199254740993", 9007199254740992.0, 0),
        ("#### 9007199254740993", 9007199254740993, 1),
        ("#### 1/3", F(1, 3), 1),
        ("#### 1/3", 1 / 3, 0),
        ("#### 0.1", decimal.Decimal("0.1"), 1),
        ("#### 7", np.int64(7), 1),
        ("#### 0.1", np.float64(0.1), 1),
        ("7", 7, 0),
        ("", 0, 0),
    ],
)
def test_exact_compares_numbers(answer, result, right):
    assert distill.exact({"prompt": "", "result": result}, answer) == right


NO_NUMBERS = [
    "12",
    "twelve",
    "",
    True,
    False,
    None,
    float("nan"),
    float("inf"),
    -float("inf"),
    [12],
    {"a": 1},
    (1, 2),
    b"12",
    1j,
]


@pytest.mark.parametrize("gold", [*NO_NUMBERS, np.bool_(True), decimal.Decimal("NaN")], ids=repr)
def test_gold_that_is_no_number_is_refused(gold):
    with pytest.raises(OptionError, match='expected a finite number as "result"'):
        distill.exact({"prompt": "", "result": gold}, "#### 12")
    with pytest.raises(OptionError, match="problem 1: the verifier exact compares numbers"):
        verify.need([{"prompt": "", "result": 1}, {"prompt": "", "result": gold}], "exact")


def test_gold_in_quotes_is_told_how_to_mend():
    with pytest.raises(OptionError, match=r"got '12' \(str\); write it without quotes"):
        distill.exact({"prompt": "", "result": "12"}, "#### 12")


@pytest.mark.parametrize(
    "gold", [None, 3, ["assert True"], "", " \n", "# nothing", "assert (", b"assert True", "x = '\0'"], ids=repr
)
def test_tests_that_cannot_fail_are_refused(gold):
    with pytest.raises(OptionError, match="problem 0: the verifier python"):
        verify.need([{"prompt": "", "tests": gold}], "python")


def test_tests_that_no_text_holds_are_refused_when_asked():
    with pytest.raises(OptionError, match=r"got \['assert False'\] \(list\); join a list of lines"):
        distill.python({"prompt": "", "tests": ["assert False"]}, "x = 1")


@pytest.mark.parametrize("gold", ["12", True, float("nan")])
def test_nothing_is_recorded_for_gold_that_cannot_be_judged_by(small, tmp_path, gold):
    wrong = [{"prompt": "1+1?", "result": 2}, {"prompt": "2+2?", "result": gold}]
    for held in ({}, {"problems": [{"prompt": "3+3?", "result": 6}], "held_out": wrong}):
        with pytest.raises(OptionError, match='expected a finite number as "result"'):
            distill.distil(small, distill.Distillation(), tmp_path / "run", **({"problems": wrong} | held))
    assert not (tmp_path / "run").exists()
    with pytest.raises(OptionError, match="problem 1: the verifier exact"):
        distill.judge(small, wrong, "exact")


def test_a_store_with_gold_that_cannot_be_judged_by_is_refused(small, tmp_path):
    store = distill.record(small, [{"prompt": "1+1?", "result": "2"}], tmp_path / "s", gen_length=32, block_length=16)
    with pytest.raises(OptionError, match="problem 0: the verifier exact compares numbers"):
        distill.keep(store, "exact")
    with pytest.raises((TraceError, VerifierError)):
        distill.keep(store, lambda problem, answer: distill.exact(problem, answer))


def test_the_small_models_answers_are_read_as_before(small):
    """Plain whole numbers: figures that were published stay."""
    import re

    import djax

    drawn = problems.held_out(8)
    answers = djax.generate(small, [p.question for p in drawn], gen_length=64, block_length=16, decoder=djax.Threshold(0.9))
    for text in [*(a.text for a in answers), *(p.answer for p in drawn)]:
        before = re.findall(r"####\s*(-?\d+)", text)
        assert problems.stated_result(text) == (int(before[-1]) if before else None)

"""Plain numbers and sums, read exactly."""

import ast
import operator
import re
from fractions import Fraction

_WORD = {
    **{w: n for n, w in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )},
    **{w: 10 * n for n, w in enumerate("thirty forty fifty sixty seventy eighty ninety".split(), 3)},
}  # fmt: skip
SCALE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}

_TEX = [
    (re.compile(r"(?<=\d)(?:\{,\}|,?\s*\\[,!]\s*)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<![\d/.^}])(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}"), r"(\1+\2/\3)"),
    (
        re.compile(r"([$£€]\s?\d+(?:\.\d+)?)([kM])(?=[.,;!*]*(?:\s+[a-z]|\s*\Z))"),
        lambda m: m[1] + {"k": " thousand", "M": " million"}[m[2]],
    ),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"(\1)/(\2)"),
    (
        re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|textrm|boldsymbol|textsf)\s*\{([^{}]*)\}"),
        r" \1 ",
    ),
    (re.compile(r"\\(?:times|cdot|ast)\b|×|⋅|(?<=\d)\s+x\s+(?=\d)"), "*"),
    (re.compile(r"\\div\b|÷"), "/"),
    (re.compile(r"\\(?:approx|quad|qquad|left|right|displaystyle|implies|therefore|Rightarrow)\b|\\[,;:! ]|[{}]"), " "),
    (re.compile(r"\\[()\[\]]|\\(?=[$%#&])|[$£€¥₹]|\bUS(?=\$)|\b(?:USD|EUR|GBP|Rs\.?)(?=\s*-?\d)"), ""),
    (re.compile(r"(?<=\d)\s*,\s?(?=\d{3}(?!\d))(?<=\d,)"), ""),
    (re.compile(r"½"), " 1/2"),
    (re.compile(r"(?:\bnegative|\A\s*minus)\s+(?=\d)", re.I), "-"),
    (re.compile(r"(\d+) dollars? and (\d\d?) cents?"), lambda m: f"{m[1]}.{int(m[2]):02d} dollars"),
    (re.compile(r"(?<![\d/.])(\d+)\s+(\d+/\d+)(?![\d/])"), r"(\1+\2)"),
]
NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
SUM = re.compile(rf"[-+]?\s?\(*-?\s?{NUMBER}\)*(?:\s*[-+*/^]\s*\(*-?\s?{NUMBER}\)*)*")


def same(gold: Fraction, value: Fraction) -> bool:
    """Equal, or equal to six places where one of them is a decimal that was rounded."""
    return gold == value or (
        gold.denominator + value.denominator > 2
        and abs(gold) >= Fraction(1, 100)
        and abs(gold - value) <= Fraction(1, 2 * 10**6)
    )


def shown(value: Fraction) -> str:
    """A number as people write it: as a decimal if that is exact, else as a fraction."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > 1000:
        # more digits than Python prints, or anyone reads
        return "a number of hundreds of digits"
    decimal = f"{float(value):.12g}"
    return decimal if "e" not in decimal and Fraction(decimal) == value else str(value)


def exact(text: str) -> Fraction | None:
    """The value of a number, or of a sum or product of numbers; None for anything else."""
    plain = to_plain(text).strip().removesuffix(".").removesuffix("%").strip()
    match = SUM.fullmatch(plain)
    return evaluate(plain) if match else None


def to_plain(text: str) -> str:
    """TeX as plain arithmetic; without currency and thousands separators."""
    if (
        "\\" in text
        or not text.isascii()
        or "$" in text
        or "," in text
        or "/" in text
        or " x " in text
        or "{" in text
        or " cents" in text
        or "egative " in text
        or "minus " in text
    ):
        for pattern, plain in _TEX:
            text = pattern.sub(plain, text)
    return text


def evaluate(text: str) -> Fraction | None:
    try:
        return _node(ast.parse(text.strip().replace("^", "**").replace("- ", "-"), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def _node(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, power = _node(node.left), _node(node.right)
        if power.denominator == 1 and abs(power) <= 64 and abs(base) < 10**6:
            return base ** int(power)
        raise ValueError(f"{base} ^ {power} is too large for plain arithmetic")
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_node(node.left), _node(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_node(node.operand))
    raise ValueError("no plain arithmetic")


def from_words(text: str) -> Fraction | None:
    """ "twenty-one", "two hundred" at the beginning; None for anything else."""
    total, part, seen = 0, 0, False
    for word in re.findall(r"[a-z]+", text.lower()):
        if word in _WORD:
            part += _WORD[word]
        elif word in SCALE and seen:
            part, total = (part * 100, total) if word == "hundred" else (0, total + part * SCALE[word])
        elif not (word == "and" and seen):
            break
        seen = True
    return Fraction(total + part) if seen else None

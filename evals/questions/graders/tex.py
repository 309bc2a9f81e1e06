"""A result in TeX or in plain text, reduced to one of its many spellings."""

import re
from fractions import Fraction
from functools import lru_cache

from evals.questions.graders.arithmetic import exact

_UNICODE = {
    "π": "\\pi ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "×": "\\cdot ", "·": "\\cdot ",
    "⋅": "\\cdot ", "÷": "/", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "°": "^\\circ", "²": "^2",
    "³": "^3", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}", "θ": "\\theta ", "α": "\\alpha ",
    "β": "\\beta ", "ω": "\\omega ", "∅": "\\emptyset ", "–": "-",
}  # fmt: skip
_WORD = {"infinity": "\\infty ", "oo": "\\infty ", "union": "\\cup "}
_TEXT = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox|boldsymbol|operatorname|bf|rm)"
_UNWRAP = re.compile(
    r"\\\((?P<a>.*)\\\)|\\\[(?P<b>.*)\\\]|\$\$(?P<c>[^$]*)\$\$|\$(?P<d>[^$]*)\$|\\(?:frame|f)?box(?:ed)?\s*\{(?P<e>.*)\}"
    r"|(?P<f>[^{}]*)\\q?quad",
    re.DOTALL,
)
# In order: formatting, plain text into TeX, TeX into one of its spellings.
_RULES = [
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|[bB]igg?[lr]?|nonumber|therefore|rm|bf|it|sf)(?![a-zA-Z])"
                r"|\\[hv]space\*?\{[^{}]*\}"), ""),
    (re.compile(r"\\mathrm\s*\{\s*([ei])\s*\}"), r"\1"),
    (re.compile(r"\\(?:approx|simeq)(?![a-zA-Z]).*|≈.*", re.DOTALL), ""),
    (re.compile(r"(?<=\d),\s*\\!\s*(?=\d{3})|(?<=\d)(?:,|\{,\}|\\,)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[!,;: ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile("[" + "".join(_UNICODE) + "]"), lambda m: _UNICODE[m[0]]),
    (re.compile(r"\\\$|\$|\\?%|\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\(?:degree|circ)(?![a-zA-Z])"
                r"|\b(?:degrees?|percent)\b"), " "),
    (re.compile(r"√\s*(\d+|[a-zA-Z]|\([^()]*\)|\{[^{}]*\})|\b(?<!\\)sqrt\s*(\d+|\([^()]*\)|\{[^{}]*\})"),
     lambda m: f"\\sqrt{{{_inside(m[1] or m[2])}}}"),
    (re.compile(r"(?<![\\a-zA-Z])(pi|infinity|theta|infty|oo|union)(?![a-zA-Z])"),
     lambda m: _WORD.get(m[1], f"\\{m[1]} ")),
    (re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|log|ln)(?=[\s(\d^\\])"), lambda m: f"\\{m[1]} "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\(([^()]*)\)|\^(-?\d{2,}|-\d)"), lambda m: f"^{{{m[1] or m[2]}}}"),
    (re.compile(r"(?<=[\w)}])\s*\*\s*(?=[\w({\\])"), lambda m: "\\cdot "),
    (re.compile(r"\\[dt]frac|\\cfrac"), lambda m: "\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\w/.{}^])(\d+)\s+(\d+)/(\d+)(?![\w/.{^])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![\w/.}^)])(\d+)/(\d+)(?![\w/.{^(])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(le|ge|ne)q(?:slant)?(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"<=|>="), lambda m: {"<=": "\\le ", ">=": "\\ge "}[m[0]]),
    (re.compile(r",?\s+(?:and|or)\s+|,?\s*\\text\{\s*(?:and|or)\s*\}\s*"), ","),
]  # fmt: skip
_UNIT = (
    rf"(?:{_TEXT}\s*\{{[^{{}}]*\}}|(?<=[\s}}])[a-zA-Z][a-zA-Z.]+(?:\s+[a-zA-Z.]+){{0,3}}"
    r"|(?<=\d)\s*(?:cm|km|mm|kg|m|g|s|h))"
)
_TRAILING_UNIT = re.compile(rf"(?<=[\d}})\]a-z\s])\s*{_UNIT}(?:\^\{{?\d\}}?)?\s*\Z")
_LEADING_TEXT = re.compile(
    rf"\A{_TEXT}\s*\{{[^{{}}]*(?:\b(?:is|answer|are|be)\b|:)[^{{}}]*\}}\s*=?\s*(?=\S)|\A(?:\\(?:[Rr]ightarrow|implies|therefore|to)(?![a-zA-Z])|=|⇒|→|∴)\s*"
)
_WORDS = re.compile(r"\(?[A-Za-z][A-Za-z .,'-]*\)?(?:\s\d+)?")
_REPEATING = re.compile(r"(-?)(\d*)\.(\d*)\\overline\{(\d+)\}")
_MIXED = re.compile(r"(-?)(\d*)\\frac\{(-?\d+)\}\{(\d+)\}")


def _inside(text: str) -> str:
    return text[1:-1] if text[:1] in "({" else text


@lru_cache(4096)
def standard(result: str) -> str:
    """The one spelling: without spaces, units, currency, degrees, or formatting."""
    tex = result.replace("\\ ", " ").strip().removesuffix("\\").strip("\"'`").strip()
    while (match := _UNWRAP.fullmatch(tex.removesuffix(".").strip())) is not None:
        tex = next(group for group in match.groups() if group is not None).strip()
    if re.fullmatch(r"\{.*\}", tex) and _depth_holds(tex[1:-1]) and len(parts(tex[1:-1])) == 1:
        tex = tex[1:-1]
    tex = _LEADING_TEXT.sub("", tex)
    whole = re.fullmatch(rf"{_TEXT}\s*\{{(.*)\}}", tex, re.DOTALL)
    tex = (whole[1] if whole and _depth_holds(whole[1]) else tex).strip().removesuffix(".")
    for pattern, replacement in _RULES:
        tex = pattern.sub(replacement, tex)
    shorter = _TRAILING_UNIT.sub("", tex)
    if re.search(r"[\d\\]", shorter) and not shorter.rstrip().endswith(("\\", "_", "^", ",", "+", "-", "=")):
        tex = shorter
    # a space ends the name of a command, and means nothing elsewhere
    tex = re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", tex.strip())
    if re.fullmatch(r"\{.*\}", tex) and _depth_holds(tex[1:-1]):
        return rf"\{{{tex[1:-1]}\}}" if len(parts(tex[1:-1])) > 1 else tex[1:-1]
    return tex.removesuffix(".").removesuffix(",")


def _depth_holds(inside: str) -> bool:
    """Whether the braces inside balance by themselves."""
    depth = 0
    for character in inside:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def parts(tex: str) -> list[str]:
    """The parts between commas outside all brackets."""
    found, depth, start = [], 0, 0
    for i, character in enumerate(tex):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append(tex[start:i])
            start = i + 1
    return [*found, tex[start:]]


def number(tex: str) -> Fraction | None:
    """The exact value of a plain number, fraction or mixed number; None for anything else."""
    if len(tex) > 300:
        return None
    if re.fullmatch(r"[-+]?(?:\d+\.?|\d*\.\d+)", tex):
        return exact(tex.removesuffix("."))
    if match := _REPEATING.fullmatch(tex):
        sign, whole, fixed, cycle = match.groups()
        value = int(whole + fixed + cycle) - int(whole + fixed or 0)
        return Fraction(value if not sign else -value, 10 ** len(fixed) * (10 ** len(cycle) - 1))
    match = _MIXED.fullmatch(tex)
    if match and int(match[4]):
        value = Fraction(int(match[2] or 0)) + Fraction(int(match[3]), int(match[4]))
        return -value if match[1] else value
    return None


def words(result: str) -> str | None:
    r"""A result in words, as "even" or \text{Evelyn}; None for mathematics."""
    bare = result.strip().strip("$").strip()
    inside = re.fullmatch(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", bare)
    if inside and _WORDS.fullmatch(inside[1].strip()):
        return inside[1].strip()
    return bare if re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+)*|\([A-F]\)", bare) else None

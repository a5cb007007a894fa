"""Lark grammars of the tagged parts of answers, in llguidance's dialect: whatever they allow parses.

A lexeme takes as much text as it can, and never gives any back: so a name and the mark that ends it are one
terminal wherever the name may hold the mark's characters. Boxes use parametric rules: the corner written
first is remembered in the rule's number, and the second one must lie to the right of it and below.
"""

from __future__ import annotations

from collections.abc import Sequence

#: The model's seconds run to here (in windows of its own length), its pixels to there.
WINDOW_SECONDS = 10
#: The longest window there is; see `crab_edge.resolved`.
LONGEST_SECONDS = 60
SIDE = 224

#: An open label of up to 60 characters, with one word in brackets at most ("Frying (food)"). No digits, and
#: commas only before a space: else a name would take in the seconds where their brackets are forgotten.
LABEL = r"/[A-Za-z]((, |[A-Za-z '_\/\-]){0,44}[A-Za-z])?([ _]\([a-z]{1,12}\))?/"
#: What may stand between two tags, and after the last: the parsers pass it over.
SEPARATOR = r"/([ \n]{1,3}([,;.&][ \n]{0,3})?|[,;.&][ \n]{0,3})((and|then) )?/"
#: A label that doesn't itself begin the next sentence about an object.
OBJECT = rf"{LABEL} & ~/(?i:.*object.*)/"
#: An open answer: a word, a number, an option.
ANSWER = r"/[A-Za-z0-9]([A-Za-z0-9 ,'_\/\-.&()]{0,78}[A-Za-z0-9)])?/"


def answer(*values: str) -> str:
    """`<answer>X</answer>` with one of these values; with none, anything short."""
    choice = " | ".join(f'"{value}"' for value in values)
    if choice:
        return f'start: "<answer>" ({choice}) "</answer>"\n'
    return f'start: "<answer>" ANSWER "</answer>"\nANSWER: {ANSWER}\n'


def spans(starts: int = WINDOW_SECONDS, seconds: int = WINDOW_SECONDS) -> str:
    """The rules `span`, "(S E)" in whole seconds, 0 <= S < `starts`, S < E <= `seconds`, and `spans`.

    A window has room for so many spans with a second between them.
    """
    lines = []
    for start in range(starts):
        ends = " | ".join(f'"{end})"' for end in range(start + 1, seconds + 1))
        lines.append(f'"({start} " ({ends})')
    return "span: " + "\n    | ".join(lines) + f"\nspans: span{{1,{seconds // 2}}}\n"


def box(separators: Sequence[str], rule: str = "box") -> str:
    """The rule `box`: whole pixels x1, y1, x2, y2 with x1 < x2 and y1 < y2, each followed by its separator.

    The parameter's lowest byte holds x1, the next one y1.
    """
    names = [f"{rule}_{name}" for name in ("x1", "y1", "x2", "y2")]
    lines = [f"{rule}: {names[0]}::0"]
    for place, (name, separator) in enumerate(zip(names, separators, strict=True)):
        shift = 8 * (place % 2)
        choices = []
        for value in range(SIDE) if place < 2 else range(1, SIDE + 1):
            literal = f'"{value}{separator}"'
            if place < 2:
                choices.append(f"{literal} {names[place + 1]}::bit_or({value << shift})")
            else:
                following = f" {names[3]}::_" if place == 2 else ""
                choices.append(f"{literal}{following} %if lt([{shift}:{shift + 8}], {value})")
        lines.append(f"{name}::_ : " + "\n    | ".join(choices))
    return "\n".join(lines) + "\n"


#: The rule `point`: [x,y] inside the frame.
POINT = (
    'point: "[" COORDINATE "," COORDINATE "]"\n'
    f"COORDINATE: /[0-9]|[1-9][0-9]|1[0-9][0-9]|2[01][0-9]|22[0-{SIDE - 221}]/\n"
)

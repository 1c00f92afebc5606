"""A client's regular expression (ECMA-262, as JSON Schema has them) in a form that every engine reads alike.

The grammar's engine and the validator's take linear time, but differ from ECMA-262, and from each other, in
what `\\d`, `.` or `[a&&b]` mean. So patterns are parsed here and written anew from what they share: groups,
alternatives, counted repeats, and classes written out as ranges. What a linear-time engine cannot have
(look-around, back-references), or one of them lacks (word boundaries), is an `UnsupportedPatternError`.
"""

from __future__ import annotations

import re

MAX_CHARS = 4096
MAX_WEIGHT = 30_000  # of the pattern with its repeats written out, about one for each character to match
_MAX_DEPTH = 50
_LAST = 0x10FFFF
_PROPERTY_WEIGHT = 50  # its automaton is that much larger than a character's

Ranges = list[tuple[int, int]]

_DIGITS: Ranges = [(0x30, 0x39)]
_WORD: Ranges = [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]
_SPACE: Ranges = [
    *((0x09, 0x0D), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
]
_LINE_ENDS: Ranges = [(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]
_SURROGATES = (0xD800, 0xDFFF)
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0}
_COUNTS = re.compile(r"\{(\d+)(?:(,)(\d*))?\}", re.ASCII)
_HEX = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|u\{([0-9a-fA-F]{1,6})\}")
_PROPERTY = re.compile(
    r"[pP]\{(?:L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?|Letter|Number|Punctuation|Symbol)\}"
)


class PatternError(ValueError):
    """The pattern is malformed or too long."""


class UnsupportedPatternError(PatternError):
    """The pattern may be well-formed, but the engines lack what it uses, or cannot hold as much of it."""


def portable(pattern: str) -> str:
    """`pattern` rewritten: it matches in the same texts, in every engine.

    Raises PatternError where it is malformed or too long, UnsupportedPatternError where it cannot be written.
    """
    if len(pattern) > MAX_CHARS:
        raise PatternError(f"is longer than {MAX_CHARS} characters")
    parser = _Parser(pattern)
    text, weight = parser.alternatives(0)
    if parser.at < len(pattern):
        raise PatternError("has a ')' without its '('")
    _check(weight)
    return text


class _Parser:
    """Recursive descent; each method returns the text written and its weight."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.at = 0

    def alternatives(self, depth: int) -> tuple[str, int]:
        if depth > _MAX_DEPTH:
            raise PatternError(f"is nested more than {_MAX_DEPTH} levels deep")
        branches: list[str] = []
        weight = 0
        while True:
            text, cost = self._sequence(depth)
            branches.append(text)
            weight += cost
            if not self._take("|"):
                return "|".join(branches), weight

    def _sequence(self, depth: int) -> tuple[str, int]:
        parts: list[str] = []
        weight = 1
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            if self._pattern[self.at] in "^$":
                parts.append(self._pattern[self.at])
                self.at += 1
                continue
            text, cost = self._atom(depth)
            repeat, times = self._repeat()
            cost = (cost + 1) * max(times, 1)
            _check(cost)
            weight += cost
            parts.append(text + repeat)
        return "".join(parts), weight

    def _atom(self, depth: int) -> tuple[str, int]:
        char = self._pattern[self.at]
        self.at += 1
        match char:
            case "(":
                return self._group(depth)
            case "[":
                return self._class()
            case "\\":
                return self._escape()
            case ".":
                return _written(_complement(_LINE_ENDS))
            case "*" | "+" | "?":
                raise PatternError(f"has a {char!r} with nothing to repeat")
            case "{" if _COUNTS.match(self._pattern, self.at - 1):
                raise PatternError("has a '{…}' with nothing to repeat")
        return _literal(ord(char)), 1

    def _group(self, depth: int) -> tuple[str, int]:
        if self._take("?"):
            named = re.compile(r"<[A-Za-z_$][\w$]*>").match(self._pattern, self.at)
            if named:
                self.at = named.end()
            elif not self._take(":"):
                raise UnsupportedPatternError("uses look-around, flags or another extension after '(?'")
        text, weight = self.alternatives(depth + 1)
        if not self._take(")"):
            raise PatternError("has a '(' without its ')'")
        return f"(?:{text})", weight

    def _repeat(self) -> tuple[str, int]:
        """What follows an atom, and how often that is written out."""
        text, times = "", 1
        counts = _COUNTS.match(self._pattern, self.at)
        if counts:
            low, comma, high = counts.groups()
            # Longer numbers are only read to be refused; leading zeros are not engines' business.
            least = int(low[:9])
            most = least if comma is None else int(high[:9]) if high else None
            if max(len(low), len(high or "")) > 9 or (most is not None and most < least):
                raise PatternError(f"has a repeat out of bounds: {counts[0][:40]}")
            text = f"{{{least}}}" if comma is None else f"{{{least},{'' if most is None else most}}}"
            times = least + 1 if most is None else most
            self.at = counts.end()
        else:
            for mark in "*+?":
                if self._take(mark):
                    text = mark
                    break
        if text:
            self._take("?")  # lazy or greedy: the same texts match
            after = self._pattern[self.at : self.at + 1]
            if after and (after in "*+?" or (after == "{" and _COUNTS.match(self._pattern, self.at))):
                raise PatternError(f"has a {after!r} with nothing to repeat")
        return text, times

    # --- single characters ------------------------------------------------------------------------

    def _escape(self) -> tuple[str, int]:
        """A `\\…` outside of classes."""
        char = self._pattern[self.at : self.at + 1]
        if char and char in "bBkAZzGQE123456789":
            raise UnsupportedPatternError(f"uses \\{char}, which no linear-time engine here offers")
        ranges, properties = self._escaped()
        if properties:
            return properties, _PROPERTY_WEIGHT
        if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
            return _literal(ranges[0][0]), 1
        return _written(ranges)

    def _escaped(self) -> tuple[Ranges, str]:
        """What a `\\…` stands for, in or out of a class: ranges, or a Unicode property as text."""
        char = self._pattern[self.at : self.at + 1]
        if not char:
            raise PatternError("ends in a backslash")
        if char.lower() in _CLASSES:
            self.at += 1
            ranges = _CLASSES[char.lower()]
            return (ranges if char.islower() else _complement(ranges)), ""
        if char in "pP":
            found = _PROPERTY.match(self._pattern, self.at)
            if not found:
                raise UnsupportedPatternError("names a Unicode property other than a general category")
            self.at = found.end()
            return [], "\\" + found[0]
        if char in _CONTROLS:
            if char == "0" and self._pattern[self.at + 1 : self.at + 2].isdigit():
                raise UnsupportedPatternError("uses an octal escape")
            self.at += 1
            return _one(_CONTROLS[char]), ""
        if char == "c":
            letter = self._pattern[self.at + 1 : self.at + 2]
            if not (letter.isascii() and letter.isalpha()):
                raise PatternError("has a \\c without a letter")
            self.at += 2
            return _one(ord(letter) % 32), ""
        if char in "xu":
            return _one(self._hexadecimal()), ""
        if char.isascii() and char.isalnum():
            raise UnsupportedPatternError(f"uses \\{char}")
        self.at += 1
        return _one(ord(char)), ""

    def _hexadecimal(self) -> int:
        found = _HEX.match(self._pattern, self.at)
        if not found:
            raise PatternError("has a \\x or \\u without its digits")
        self.at = found.end()
        code = int(next(group for group in found.groups() if group), 16)
        if 0xD800 <= code < 0xDC00 and self._pattern.startswith("\\u", self.at):
            # A pair of surrogates, as JSON has them, is one character.
            low = re.compile(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})").match(self._pattern, self.at)
            if low:
                self.at = low.end()
                code = 0x10000 + ((code - 0xD800) << 10) + (int(low[1], 16) - 0xDC00)
        if code > _LAST:
            raise PatternError("names a character beyond Unicode")
        if _SURROGATES[0] <= code <= _SURROGATES[1]:
            raise UnsupportedPatternError("names half of a surrogate pair")
        return code

    # --- classes ----------------------------------------------------------------------------------

    def _class(self) -> tuple[str, int]:
        negated = self._take("^")
        ranges: Ranges = []
        properties = ""
        while not self._take("]"):
            start, more = self._member()
            properties += more
            if self._pattern.startswith("-", self.at) and not self._pattern.startswith("-]", self.at):
                self.at += 1
                end, more = self._member()
                properties += more
                if _is_one(start) and _is_one(end):
                    if start[0][0] > end[0][0]:
                        raise PatternError("has a range in a class that ends before it begins")
                    start = [(start[0][0], end[0][0])]
                else:  # as in [\w-.]: the hyphen stands for itself
                    start = [*start, *_one(0x2D), *end]
            ranges += start
        if properties:
            inside = "".join(map(_range, _merged(ranges)))
            return f"[{'^' if negated else ''}{inside}{properties}]", 2 * _PROPERTY_WEIGHT
        ranges = _complement(ranges) if negated else _merged(ranges)
        if not ranges:
            raise UnsupportedPatternError("has a class that no character is in")
        return _written(ranges)

    def _member(self) -> tuple[Ranges, str]:
        char = self._pattern[self.at : self.at + 1]
        if not char:
            raise PatternError("has a '[' without its ']'")
        self.at += 1
        if char != "\\":
            return _one(ord(char)), ""
        if self._take("b"):
            return _one(8), ""
        return self._escaped()

    def _take(self, text: str) -> bool:
        if self._pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False


def _check(weight: int) -> None:
    if weight > MAX_WEIGHT:
        raise UnsupportedPatternError(f"repeats too much: written out, it has more than {MAX_WEIGHT} parts")


def _one(code: int) -> Ranges:
    return [(code, code)]


def _is_one(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _merged(ranges: Ranges) -> Ranges:
    """In order, without overlaps."""
    result: Ranges = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def _complement(ranges: Ranges) -> Ranges:
    """All other characters; surrogates are none."""
    result: Ranges = []
    start = 0
    for low, high in [*_merged([*ranges, _SURROGATES]), (_LAST + 1, _LAST + 1)]:
        if start < low:
            result.append((start, low - 1))
        start = high + 1
    return result


def _written(ranges: Ranges) -> tuple[str, int]:
    # A range beyond ASCII takes several byte sequences.
    return f"[{''.join(map(_range, ranges))}]", 2 if ranges[-1][1] < 0x80 else 4


def _range(pair: tuple[int, int]) -> str:
    low, high = pair
    return _literal(low) if low == high else f"{_literal(low)}-{_literal(high)}"


def _literal(code: int) -> str:
    """One character as every engine reads it, in a class or not."""
    char = chr(code)
    return char if code >= 0x80 or char.isalnum() else f"\\x{code:02x}"

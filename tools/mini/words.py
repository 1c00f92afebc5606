"""Words, names and values that the conversations are about, split by hash into training and evaluation."""

from __future__ import annotations

import base64
import hashlib
import random
from pathlib import Path

CITIES = """\
Beijing Shanghai Tokyo Osaka Kyoto Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin
Oslo Stockholm Helsinki Copenhagen Amsterdam Brussels Zurich Geneva Munich Hamburg Frankfurt Cologne
Leipzig Dresden Milan Naples Turin Venice Florence Barcelona Valencia Seville Porto Athens Istanbul
Ankara Izmir Cairo Alexandria Tunis Algiers Casablanca Rabat Lagos Accra Nairobi Kampala Kigali Lusaka
Harare Durban Pretoria Johannesburg Dakar Bamako Tehran Baghdad Riyadh Jeddah Dubai Doha Muscat Kuwait
Beirut Amman Damascus Jerusalem Karachi Lahore Delhi Mumbai Chennai Kolkata Bangalore Hyderabad Dhaka
Colombo Kathmandu Yangon Bangkok Hanoi Saigon Manila Jakarta Bandung Singapore Seoul Busan Taipei
Guangzhou Shenzhen Chengdu Wuhan Nanjing Hangzhou Tianjin Xiamen Harbin Sydney Melbourne Brisbane Perth
Adelaide Auckland Wellington Toronto Montreal Vancouver Ottawa Calgary Boston Chicago Seattle Denver
Dallas Houston Austin Miami Atlanta Phoenix Portland Detroit Cleveland Memphis Nashville Baltimore
Philadelphia Havana Bogota Lima Quito Santiago Montevideo Caracas Brasilia Recife Salvador Cordoba
Rosario Asuncion Kyiv Minsk Riga Vilnius Tallinn Moscow Kazan Sofia Bucharest Belgrade Zagreb Budapest
Bratislava Ljubljana Sarajevo Skopje Tirana Reykjavik Tbilisi Yerevan Baku Tashkent Almaty Bergen
Gothenburg Malmo Aarhus Ghent Antwerp Rotterdam Utrecht Lyon Marseille Toulouse Nice Bordeaux Lille
Nantes Glasgow Edinburgh Manchester Liverpool Bristol Leeds Cardiff Belfast Cork Galway""".split()

# fmt: off
# fmt: off
LONG_CITIES = [
    "New York", "Los Angeles", "San Francisco", "San Diego", "Hong Kong", "Buenos Aires", "Sao Paulo",
    "Rio de Janeiro", "Mexico City", "Cape Town", "Tel Aviv", "Abu Dhabi", "Kuala Lumpur",
    "Saint Petersburg", "Las Vegas", "New Orleans", "New Delhi", "Phnom Penh", "Ho Chi Minh City",
    "Addis Ababa", "Salt Lake City", "Santa Cruz", "San Jose", "Quebec City", "Panama City",
    "Port Louis", "La Paz", "Den Haag",
]

_ONSETS = [
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pl",
    "qu", "r", "s", "sh", "st", "t", "tr", "v", "w", "x", "y", "z", "",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "ou", "ia", "y"]
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "t", "k", "ng", "rd", "x", "ck"]
# fmt: on
# fmt: on


def is_held_out(kind: str, text: str) -> bool:
    """True for the tenth of all values that training never sees."""
    return hashlib.sha256(f"{kind}:{text}".encode()).digest()[0] % 10 == 0


def published_words(path: Path, limit: int = 24000) -> list[str]:
    """Whole lower-case words of the published vocabulary file, most frequent first."""
    words: dict[str, None] = {}
    with path.open("rb") as lines:
        for line in lines:
            raw = base64.b64decode(line.split()[0]).strip().lower()
            if 3 <= len(raw) <= 11 and raw.isalpha() and raw.isascii():
                words[raw.decode()] = None
                if len(words) >= limit:
                    break
    return list(words)


class Lexicon:
    """Draws values, names and nouns of one side of the split."""

    def __init__(self, words: list[str], *, held_out: bool = False) -> None:
        self.held_out = held_out
        self.nouns = [w for w in words if is_held_out("word", w) == held_out]
        self.cities = [c for c in CITIES + LONG_CITIES if is_held_out("word", c) == held_out]

    def noun(self, rng: random.Random) -> str:
        return rng.choice(self.nouns)

    def city(self, rng: random.Random) -> str:
        return rng.choice(self.cities)

    def made_up(self, rng: random.Random) -> str:
        """A word that exists in no language, from syllables or from plain random letters."""
        while True:
            if rng.random() < 0.6:
                word = "".join(
                    rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                    for _ in range(rng.randint(1, 3))
                )
            else:
                word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9)))
            if len(word) >= 3 and is_held_out("word", word) == self.held_out:
                return word

    def code(self, rng: random.Random) -> str:
        """An identifier such as `a7f3`, `TX-4411` or `user_42`."""
        kind = rng.randrange(4)
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
        letters = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(1, 3)))
        if kind == 0:
            return letters + digits
        if kind == 1:
            return f"{letters.upper()}-{digits}"
        if kind == 2:
            return f"{self.noun(rng)}_{digits}"
        return digits

    def name(self, rng: random.Random) -> str:
        """A place or a person: mostly one capitalised word, sometimes two."""
        draw = rng.random()
        if draw < 0.35:
            return self.city(rng)
        if draw < 0.55:
            return self.noun(rng).capitalize()
        if draw < 0.8:
            return self.made_up(rng).capitalize()
        if draw < 0.9:
            return f"{self.made_up(rng).capitalize()} {self.noun(rng).capitalize()}"
        return self.noun(rng) if draw < 0.95 else self.made_up(rng)

    def value(self, rng: random.Random) -> str:
        """Anything short that a result can hold."""
        draw = rng.random()
        if draw < 0.3:
            return self.noun(rng)
        if draw < 0.5:
            return self.noun(rng).capitalize()
        if draw < 0.65:
            return self.made_up(rng)
        if draw < 0.75:
            return self.made_up(rng).capitalize()
        if draw < 0.9:
            return f"{self.noun(rng)} {self.noun(rng)}"
        return self.code(rng)

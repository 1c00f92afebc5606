"""Names, values and made-up words of one side of the split."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from k2hybrid.mini_eval.split import Side, side_of

# fmt: off
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
Gothenburg Malmö Aarhus Ghent Antwerp Rotterdam Utrecht Lyon Marseille Toulouse Nice Bordeaux Lille
Nantes Glasgow Edinburgh Manchester Liverpool Bristol Leeds Cardiff Belfast Cork Galway Zürich Köln
Düsseldorf Kraków Łódź Málaga Bogotá Québec Tromsø Genève Göteborg""".split()
LONG_CITIES = [
    "New York", "Los Angeles", "San Francisco", "San Diego", "Hong Kong", "Buenos Aires", "São Paulo",
    "Rio de Janeiro", "Mexico City", "Cape Town", "Tel Aviv", "Abu Dhabi", "Kuala Lumpur",
    "Saint Petersburg", "Las Vegas", "New Orleans", "New Delhi", "Phnom Penh", "Ho Chi Minh City",
    "Addis Ababa", "Salt Lake City", "Santa Cruz", "San Jose", "Quebec City", "Panama City",
    "Port Louis", "La Paz", "Den Haag", "San Francisco, CA", "Boston, MA", "Paris, France", "Austin, TX",
]
PEOPLE = """\
Anna Ben Carla David Emma Felix Grace Hannah Ivan Julia Kevin Laura Mark Nina Oscar Paula Quentin Rosa
Samuel Tina Ursula Victor Wendy Xavier Yara Zoe Alice Bob Carol Dan Erin Frank Gina Henry Iris Jack
Kate Liam Maria Noah Olivia Peter Quinn Ruth Sarah Tom Uma Vera Will Yusuf Ahmed Chen Wei Li Priya Raj
Sofia Mateo Lucia Diego Elena Marco Giulia Hiro Yuki Sven Lars Ingrid Olga Dmitri Fatima Omar""".split()

_ONSETS = [
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kr", "l", "m", "n", "p", "pl",
    "qu", "r", "s", "sh", "st", "t", "tr", "v", "w", "x", "y", "z", "",
]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ee", "ou", "ia", "y"]
_CODAS = ["", "", "", "n", "r", "l", "s", "m", "t", "k", "ng", "rd", "x", "ck"]
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ENDINGS = ["com", "org", "net", "io", "dev"]
_SUFFIXES = ["txt", "md", "csv", "json", "log", "py", "pdf", "png"]
# fmt: on


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


def kept_words() -> list[str]:
    """The words kept for testing, as shipped: those of `published_words` on that side."""
    return resources.files(__package__).joinpath("test_words.txt").read_text(encoding="utf-8").split()


class Lexicon:
    """Draws words and values of one side.

    `words` not of this side are left out, unless `whole` says that the caller has split them already (another
    list of test words).
    """

    def __init__(self, words: list[str], side: Side, *, whole: bool = False) -> None:
        self.side: Side = side
        self.nouns = words if whole else [w for w in words if side_of("word", w) == side]
        if len(self.nouns) < 10:
            raise ValueError(f"the word list has {len(self.nouns)} words for {side}; at least 10 are needed")
        self.cities = [c for c in CITIES + LONG_CITIES if side_of("word", c) == side]
        self.people = [p for p in PEOPLE if side_of("word", p) == side]
        self._kinds: dict[str, Callable[[random.Random], object]] = {
            "place": self.place, "person": self.person, "word": self.word, "phrase": self.phrase,
            "code": self.code, "email": self.email, "date": self.date, "time": self.time, "path": self.path,
            "int": self.integer, "decimal": self.decimal, "name": self.name,
        }  # fmt: skip

    def draw(self, rng: random.Random, kind: str) -> object:
        """A value of a scalar kind."""
        return self._kinds[kind](rng)

    def noun(self, rng: random.Random) -> str:
        return rng.choice(self.nouns)

    def made_up(self, rng: random.Random) -> str:
        """A word that exists in no language, from syllables or from plain random letters."""
        while True:
            if rng.random() < 0.6:
                word = "".join(
                    rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
                    for _ in range(rng.randint(1, 3))
                )
            else:
                word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 9)))
            if len(word) >= 3 and side_of("word", word) == self.side:
                return word

    def word(self, rng: random.Random) -> str:
        """One lower-case word: published, or made up in three of ten draws."""
        return self.made_up(rng) if rng.random() < 0.3 else self.noun(rng)

    def code(self, rng: random.Random) -> str:
        """An identifier such as `a7f3`, `TX-4411`, `user_42` or `4411`."""
        shape = rng.randrange(5)
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
        letters = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 3)))
        if shape == 0:
            return letters + digits
        if shape == 1:
            return f"{letters.upper()}-{digits}"
        if shape == 2:
            return f"{self.noun(rng)}_{digits}"
        if shape == 3:
            return "".join(rng.choice("0123456789abcdef") for _ in range(rng.randint(4, 8)))
        return digits

    def place(self, rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.4:
            return rng.choice(self.cities)
        if draw < 0.65:
            return self.noun(rng).capitalize()
        if draw < 0.9:
            return self.made_up(rng).capitalize()
        return f"{self.word(rng).capitalize()} {self.word(rng).capitalize()}"

    def person(self, rng: random.Random) -> str:
        draw = rng.random()
        if draw < 0.35:
            return rng.choice(self.people)
        first = self.word(rng).capitalize()
        return f"{first} {self.word(rng).capitalize()}" if draw > 0.8 else first

    def name(self, rng: random.Random) -> str:
        """What a thing may be called."""
        draw = rng.random()
        if draw < 0.55:
            return self.word(rng)
        if draw < 0.75:
            return self.word(rng).capitalize()
        if draw < 0.9:
            return f"{self.word(rng)} {self.word(rng)}"
        return self.code(rng)

    def phrase(self, rng: random.Random) -> str:
        """Some words, as a title or a text may have them."""
        text = " ".join(self.word(rng) for _ in range(rng.randint(2, 5)))
        return text.capitalize() if rng.random() < 0.5 else text

    def email(self, rng: random.Random) -> str:
        dot = f".{self.word(rng)}" if rng.random() < 0.2 else ""
        return f"{self.word(rng)}{dot}@{self.word(rng)}.{rng.choice(_ENDINGS)}"

    def date(self, rng: random.Random) -> str:
        return f"{rng.randint(2019, 2032)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"

    def time(self, rng: random.Random) -> str:
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"

    def path(self, rng: random.Random) -> str:
        folders = "".join(f"{self.word(rng)}/" for _ in range(rng.randint(0, 2)))
        start = "/" if folders and rng.random() < 0.5 else ""
        return f"{start}{folders}{self.word(rng)}.{rng.choice(_SUFFIXES)}"

    def integer(self, rng: random.Random) -> int:
        return rng.randint(1, 20) if rng.random() < 0.5 else rng.randint(1, 10 ** rng.randint(2, 5))

    def decimal(self, rng: random.Random) -> float | int:
        places = rng.choice([0, 1, 1, 2])
        value = rng.randint(1, 999 * 10**places) / 10**places
        return int(value) if value == int(value) else value

    def value(self, rng: random.Random) -> str | int | float:
        """Anything short that a result can hold."""
        draw = rng.random()
        if draw < 0.4:
            return self.word(rng)
        if draw < 0.6:
            return self.word(rng).capitalize()
        if draw < 0.7:
            return f"{self.word(rng)} {self.word(rng)}"
        if draw < 0.8:
            return self.code(rng)
        return self.integer(rng) if draw < 0.93 else self.decimal(rng)

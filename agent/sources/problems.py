# SPDX-License-Identifier: Apache-2.0
"""Errors of a configuration: collected, each with its place, and raised together."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from shunt.lb.errors import ShuntError

# A file with more errors than this is the wrong file; the rest is counted, not listed.
MOST_ERRORS = 1000


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A line of a file. Line 0 stands for the file as a whole."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One error of a configuration."""

    place: Place
    what: str
    why: str
    fix: str

    @property
    def file(self) -> str:
        return self.place.file

    @property
    def line(self) -> int:
        return self.place.line

    def text(self, in_force: str = "") -> str:
        """The three lines a person reads.

        `in_force` says what still holds, as in "the running configuration (generation 41) is
        still in force"; who has a running configuration gives it.
        """
        fix = f"{self.fix}; {in_force}" if in_force else self.fix
        return f"{self.place}: {self.what}\n  why: {self.why}\n  fix: {fix}"

    def __str__(self) -> str:
        return self.text()


class ConfigErrors(ShuntError):
    """All errors of a configuration, by file and line. Nothing of it may be used."""

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = list(errors)
        count = len(self.errors)
        super().__init__(
            f"the configuration has {count} error{'s' if count != 1 else ''}",
            "; ".join(f"{error.place}: {error.what}" for error in self.errors[:3])
            + ("; ..." if count > 3 else ""),
            "correct them all: `shunt config check` lists each with its file and line",
        )

    def text(self, in_force: str = "") -> str:
        """Every error in its three lines."""
        return "\n".join(error.text(in_force) for error in self.errors)

    def __str__(self) -> str:
        return self.text()


class Problems:
    """Collects errors, so that a person sees all of them at once."""

    def __init__(self) -> None:
        self._errors: list[ConfigError] = []
        self._unlisted: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._errors) + sum(self._unlisted.values())

    def add(self, place: Place, what: str, why: str, fix: str) -> None:
        """Note one error."""
        if len(self._errors) < MOST_ERRORS:
            self._errors.append(ConfigError(place, what, why, fix))
        else:
            self._unlisted[place.file] = self._unlisted.get(place.file, 0) + 1

    def take(self, errors: Iterable[ConfigError]) -> None:
        """Note errors that were noted elsewhere."""
        for error in errors:
            self.add(error.place, error.what, error.why, error.fix)

    def raise_any(self) -> None:
        """Raises: ConfigErrors with every error noted, by file and line."""
        if errors := self.errors():
            raise ConfigErrors(errors)

    def errors(self) -> list[ConfigError]:
        """Every error noted, by file and line."""
        errors = sorted(self._errors, key=lambda error: error.place)
        for file, count in sorted(self._unlisted.items()):
            errors.append(
                ConfigError(
                    Place(file, 1),
                    f"{count} more errors are not listed",
                    f"the first {MOST_ERRORS} are enough to work on",
                    "correct those listed and check again",
                )
            )
        return errors


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that was probably meant, or ""."""
    return next(iter(get_close_matches(word, list(known), n=1)), "")


def shown(text: str) -> str:
    """A value as it may stand in a message: one line, short."""
    plain = text if text.isprintable() else ascii(text)[1:-1]
    plain = plain if len(plain) <= 60 else f"{plain[:57]}..."
    return plain or '""'

"""What a study fixes or searches: a number, a range of numbers, or a few numbers or words to choose from."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

MOST_CHOICES = 32
NEAR = 0.01  # of a range: no further from its end than this is at its end


class SearchRange(BaseModel):
    """Numbers from `low` to `high`, on a logarithmic scale if `log`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float
    high: float
    log: bool = False


Searchable = SearchRange | tuple[float, ...] | float
Choice = Searchable | str | tuple[str, ...]


class Bounds(NamedTuple):
    """What a number may be at all."""

    low: float
    high: float
    whole: bool = False


def read_searchable(value: Any, bounds: Bounds) -> Searchable:
    """A number, a list of numbers, `{low, high, log}`, or one of them as text: `0.001`, `64,128`, `1e-4..1e-2 log`.

    A list of one leaves nothing to choose, and is that number. Raises ValueError with the rule.
    """
    kind = "whole number" if bounds.whole else "number"
    rule = (
        f"must be a {kind} from {bounds.low:g} to {bounds.high:g}, a list of up to {MOST_CHOICES} such numbers, or a "
        f"range of them: {{low = …, high = …, log = true}}, as text 'LOW..HIGH log'"
    )
    try:
        found = _parsed(value)
    except (TypeError, ValueError, KeyError, OverflowError):
        raise ValueError(rule) from None
    if isinstance(found, SearchRange):
        numbers: tuple[float, ...] = found.low, found.high
        right = found.low < found.high and (found.low > 0 or not found.log)
    else:
        numbers = found if isinstance(found, tuple) else (found,)
        right = 0 < len(set(numbers)) == len(numbers) <= MOST_CHOICES
    if not right or not all(bounds.low <= n <= bounds.high and not (bounds.whole and n % 1) for n in numbers):
        raise ValueError(rule)
    return numbers[0] if len(numbers) == 1 else found


def read_words(value: Any, known: Sequence[str]) -> str | tuple[str, ...]:
    """One of the words `known`, or several to choose from: a list, or as text `adamw,sgd`. ValueError with the rule.

    A list of one is that word.
    """
    words = value.split(",") if isinstance(value, str) and "," in value else value
    found = list(words) if isinstance(words, list | tuple) else [words]
    if not found or len(set(map(str, found))) < len(found) or not all(word in known for word in found):
        raise ValueError(f"must be one of {', '.join(known)}, or a list of several of them")
    return tuple(found) if len(found) > 1 else str(found[0])


def text_of(value: Choice) -> str:
    """As it can be given on a command line."""
    if isinstance(value, SearchRange):
        return f"{_number_text(value.low)}..{_number_text(value.high)}{' log' if value.log else ''}"
    return ",".join(map(_number_text, value)) if isinstance(value, tuple) else _number_text(value)


def nearest(value: float, allowed: Choice) -> float:
    """What of `allowed`, which are numbers, is nearest to one."""
    assert not isinstance(allowed, str), "a word"
    if isinstance(allowed, SearchRange):
        return min(max(value, allowed.low), allowed.high)
    if not isinstance(allowed, tuple):
        return allowed
    return min((choice for choice in allowed if not isinstance(choice, str)), key=lambda choice: abs(choice - value))


def range_beyond(value: float, searched: SearchRange, bounds: Bounds) -> SearchRange | None:
    """Where to look next if `value` is at an end of what was searched: as wide again, with that end in the middle.

    None where it is at neither, or nothing lies beyond.
    """
    scale, back = (math.log, math.exp) if searched.log else (float, float)
    low, high, at = scale(searched.low), scale(searched.high), scale(nearest(value, searched))
    width = high - low
    if high - at <= NEAR * width:
        end, middle = searched.high, high
    elif at - low <= NEAR * width:
        end, middle = searched.low, low
    else:
        return None
    first, last = back(middle - width / 2), back(middle + width / 2)
    if bounds.whole:
        first, last = math.floor(first), math.ceil(last)
    elif searched.log:
        first, last = float(f"{first:.3g}"), float(f"{last:.3g}")
    else:
        digits = 2 - math.floor(math.log10(width))
        first, last = round(first, digits), round(last, digits)
    first, last = max(first, bounds.low), min(last, bounds.high)
    sound = first < end < last and (first > 0 or not searched.log)
    return SearchRange(low=first, high=last, log=searched.log) if sound else None


def is_searched(value: object) -> bool:
    """Whether it leaves something to choose."""
    return isinstance(value, SearchRange | tuple)


def _parsed(value: Any) -> Searchable:
    if isinstance(value, SearchRange):
        return value
    if isinstance(value, dict):
        if set(value) - {"low", "high", "log"} or not isinstance(value.get("log", False), bool):
            raise ValueError
        return SearchRange(low=_number(value["low"]), high=_number(value["high"]), log=value.get("log", False))
    if isinstance(value, str):
        low, dots, high = value.removesuffix(" log").partition("..")
        if dots:
            return SearchRange(low=_number(low), high=_number(high), log=value.endswith(" log"))
        return tuple(map(_number, value.split(","))) if "," in value else _number(value)
    return tuple(map(_number, value)) if isinstance(value, list | tuple) else _number(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _number_text(value: float | str) -> str:
    return value if isinstance(value, str) else repr(value).removesuffix(".0")

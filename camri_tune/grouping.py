"""Which files show one object: groups named by a pattern or by a list, as numbers, on one side of every split.

A pattern may come from anybody, in a study file or in a bundle. RE2 searches in time that grows with the path and not
with the pattern's cunning; Python's own `re` needs minutes for `(a+)+$` and thirty letters.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from camri_tune.config import shown
from camri_tune.errors import DataError, InputError

PartName = TypeVar("PartName", bound=str)
WAY_OUT = r"write what tells an object apart as (?P<group>…), such as '(?P<group>patient\d+)_'"


class NotGroupedError(DataError):
    """A pattern that names no groups here: nothing matches it, or there are no paths to search."""


class Listed(NamedTuple):
    """An image file of a data set; `group` is the name of what it shows, None where nobody says."""

    path: str
    label: int
    group: str | None = None


class Item(NamedTuple):
    path: str  # of a hundred thousand files, `Path`s would take seconds
    label: int
    group: int


def match_groups(pattern: str, names: Sequence[str]) -> list[str | None]:
    """What `pattern` finds in each of these paths as its group `group`; None where it does not match, or finds nothing.

    Paths may be any bytes that a file can be called. Raises NotGroupedError where none matches, and InputError for a
    pattern that cannot be used.
    """
    try:
        import re2  # noqa: PLC0415 - of an extra that those who name no groups do not need
    except ImportError:
        raise InputError("--group-by needs RE2, which is not installed: pip install 'camri-tune[group-by]'") from None
    given = f"--group-by is {shown(pattern)}"
    options = re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(pattern.encode(), options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if error.args else "no reason given"
        raise InputError(
            f"{given}, which RE2 cannot read ({shown(reason)}): it takes Python's syntax without look-around and "
            f"references back; {WAY_OUT}"
        ) from None
    index = compiled.groupindex.get(b"group")
    if index is None:
        raise InputError(f"{given}, but has no group of the name 'group': {WAY_OUT}")
    groups: list[str | None] = []
    for name in names:
        found = compiled.search(os.fsencode(name))
        groups.append(os.fsdecode(found.group(index) or b"") or None if found else None)
    if not any(groups):
        raise NotGroupedError(
            f"{given}, and matches none of {len(names):,} paths, such as {shown(names[0])}: paths start in the data "
            f"set's folder and have forward slashes; {WAY_OUT}"
        )
    return groups


def tell_unmatched(pattern: str, names: Sequence[str], groups: Sequence[str | None]) -> list[str]:
    """What a user should know of paths that the pattern did not match, and of one that tells nothing together."""
    alone = [name for name, group in zip(names, groups, strict=True) if group is None]
    lines = []
    if alone:
        lines.append(
            f"--group-by {shown(pattern)} does not match {len(alone):,} of {len(names):,} paths, such as "
            f"{shown(alone[0])}: each of these images is a group of its own."
        )
    named = len(names) - len(alone)
    if len(set(groups) - {None}) == named:
        lines.append(
            f"--group-by {shown(pattern)} names {named:,} groups of one image each, which is as if there were none: "
            f"it should find the same text in all images of one object."
        )
    return lines


def number_groups(parts: Mapping[PartName, Sequence[Listed]]) -> dict[PartName, list[Item]]:
    """The same files with numbers for groups, one for each name in all parts, and one for each file without a name.

    Raises DataError, naming two files, where a named group stands in two parts.
    """
    numbers: dict[str, int] = {}
    places: dict[str, tuple[str, str]] = {}
    for part, files in parts.items():
        for path, _, group in files:
            if group is None:
                continue
            numbers.setdefault(group, len(numbers))
            other, example = places.setdefault(group, (part, path))
            if other != part:
                raise DataError(
                    f"group {shown(group)} stands in two parts, with {shown(example)} in {other} and {shown(path)} in "
                    f"{part}: what shows one object must be on one side; move its images, or name groups otherwise"
                )
    return {
        part: [
            Item(path, label, len(numbers) + place if group is None else numbers[group])
            for place, (path, label, group) in enumerate(files)
        ]
        for part, files in parts.items()
    }

"""Data sets that a CSV file lists: `path,label`, and `group` and `split` where they are known.

The file may come from anybody. It is read row by row, and what a path in it may lead to is an image file or an error.
"""

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from camri_tune.config import printable, shown
from camri_tune.errors import DataError
from camri_tune.files import own_path
from camri_tune.folders import PART_NAMES, PARTS, Part, Source, grouped_by, is_class_name, own_data
from camri_tune.grouping import Listed, NotGroupedError, number_groups

COLUMNS = ("path", "label", "group", "split")
MOST_OF_A_FILE = 2**30  # bytes: some ten million rows
MOST_OF_A_HEADER = 2**16  # characters


def listed_files(table: Path, group_by: str | None = None, *, to_judge: bool = False) -> Source:
    """The images that a CSV file lists, a row each: UTF-8, with a header, separated by commas, semicolons or tabs.

    A relative path starts in the file's folder and stays there; an absolute one is taken as it is. Images that are only
    `to_judge` a finished model need neither a part to train on nor every class. Raises DataError, naming the row as a
    spreadsheet counts it, or OSError.
    """
    where = f"data set {shown(str(table))}"
    table, linked = own_path(table), table.resolve()
    rows = _rows(table, where)
    columns = next(rows)[1]
    first = list(islice(rows, 1))
    # The paths in a file that a link leads to start where the link lies, or where the file does.
    starts = [folder for folder in (table.parent, linked.parent) if _exists(first, columns, folder)]
    root = next(iter(starts), table.parent)
    if "group" in columns and group_by is not None:
        raise NotGroupedError(
            f"{where} has a column 'group', so that --group-by has nothing to say: leave one of them out"
        )
    found: dict[Part, list[tuple[str, str, str | None]]] = {}
    seen: dict[str, int] = {}
    for number, values in chain(first, rows):
        row = dict(zip(columns, values, strict=True))
        here = f"{where}, row {number:,}"
        path = _path(row["path"], root, here)
        if (before := seen.setdefault(path, number)) != number:
            raise DataError(f"{here}: {shown(row['path'])} stands in row {before:,} already; list each image once")
        if not is_class_name(row["label"]):
            what = shown(row["label"]) if row["label"] else "empty"
            raise DataError(f"{here}: label is {what}, but should be a name as a folder can have; give one")
        part = PARTS.get(row.get("split", "train").lower())
        if part is None:
            known = ", ".join(PART_NAMES)
            raise DataError(f"{here}: split is {shown(row['split'])}, but should be one of {known}")
        found.setdefault(part, []).append((path, row["label"], row.get("group") or None))
    return _source(root / table.name, found, group_by, where, to_judge)


def _source(
    table: Path,
    found: Mapping[Part, Sequence[tuple[str, str, str | None]]],
    group_by: str | None,
    where: str,
    to_judge: bool,
) -> Source:
    if not found.get("train") and not to_judge:
        raise DataError(f"{where} lists no images to train on; give rows without a split, or of the split train")
    classes = tuple(sorted({label for rows in found.values() for _, label, _ in rows}))
    if len(classes) < (1 if to_judge else 2):
        raise DataError(f"{where} has {len(classes)} label, but a classifier needs at least 2; list images of another")
    for part, rows in found.items() if not to_judge else ():
        if missing := sorted({*classes} - {label for _, label, _ in rows}):
            raise DataError(
                f"{where} lists no image of class {missing[0]!r} in split {part} ({len(missing)} such class(es)): "
                f"every class needs some in each split that is listed; add some, or leave the class or the split out"
            )
    numbers = {name: label for label, name in enumerate(classes)}
    # In an order that is not that of the rows: to sort a table makes no other data set of it.
    parts: dict[Part, list[Listed]] = {
        part: sorted(Listed(path, numbers[label], group) for path, label, group in found[part])
        for part in PART_NAMES
        if part in found
    }
    notices: list[str] = []
    if group_by is not None:
        parts, notices = grouped_by(group_by, parts, table.parent)
    else:
        files = [file for of_part in parts.values() for file in of_part]
        alone = [file.path for file in files if file.group is None]
        if 0 < len(alone) < len(files):
            notices.append(
                f"{len(alone):,} of {len(files):,} rows have no group, such as {shown(alone[0])}: each of these images "
                f"is a group of its own."
            )
    return own_data(
        table.stem,
        table.parent,
        classes,
        parts=number_groups(parts),
        groups_by="a column 'group', or --group-by",
        notices=tuple(notices),
    )


def _exists(rows: Sequence[tuple[int, list[str]]], columns: Sequence[str], folder: Path) -> bool:
    """Whether the images of these rows lie in a folder."""
    return all(os.path.isfile(folder / dict(zip(columns, values, strict=True))["path"]) for _, values in rows)


def _rows(table: Path, where: str) -> Iterator[tuple[int, list[str]]]:
    """The header as (1, names of columns), then each row that is not empty as (number, values as long as that)."""
    if table.stat().st_size > MOST_OF_A_FILE:
        raise DataError(f"{where} is longer than {MOST_OF_A_FILE:,} bytes; give each image one short row")
    number = 0
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline(MOST_OF_A_HEADER).count)
            file.seek(0)
            columns: list[str] = []
            for values in csv.reader(file, delimiter=separator, strict=True):
                number += 1
                if not any(values):
                    continue
                if not columns:
                    columns = _columns(values, where)
                    yield 1, columns
                elif len(values) != len(columns):
                    raise DataError(
                        f"{where}, row {number:,} has {len(values)} value(s), but the header {len(columns)}: quote "
                        f"values that hold {separator!r}, and give every column one, if an empty one"
                    )
                else:
                    yield number, [value.strip() for value in values]
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 after row {number:,}; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{where} cannot be read as CSV after row {number:,} ({printable(str(error))}); mend its quotes"
        ) from None
    if not columns:
        raise DataError(f"{where} is empty; its first row names the columns: path,label and perhaps group,split")


def _columns(values: Sequence[str], where: str) -> list[str]:
    names = [value.strip().lower() for value in values]
    for name in COLUMNS:
        if names.count(name) > 1:
            raise DataError(f"{where} has {names.count(name)} columns called {name!r}; name one of them otherwise")
    if missing := [name for name in COLUMNS[:2] if name not in names]:
        raise DataError(
            f"{where} has no column {missing[0]!r} in its first row, which is {shown(','.join(values[:20]))}; it "
            f"should name the columns: path,label and perhaps group,split"
        )
    return names


def _path(text: str, root: Path, here: str) -> str:
    """Where an image lies. Raises DataError where it may not lie there, or does not."""
    path = os.path.normpath(os.path.join(root, text))
    if not text:
        raise DataError(f"{here}: path is empty; name an image file")
    if not os.path.isabs(text) and re.match(r"\.\.(/|$)", os.path.relpath(path, root).replace(os.sep, "/")):
        raise DataError(
            f"{here}: path {shown(text)} leads out of the folder that the list lies in; put the list beside the "
            f"images, or write the path from / on"
        )
    try:
        there = os.path.isfile(path)
    except ValueError:  # a zero byte
        there = False
    if not there:
        hint = " (folders are separated by /)" if "\\" in text else ""
        raise DataError(f"{here}: {shown(text)} is no file{hint}; paths start in the folder that the list lies in")
    return path

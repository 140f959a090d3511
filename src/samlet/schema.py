"""Configuration files: YAML 1.2 or JSON plus `a.b=c` overrides, checked strictly, every mistake in one go.

A mistake reads `file:line: path: what is wrong (did you mean ...?)`. Nothing in a file can name code.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from samlet.errors import ConfigError

Loc = tuple[str | int, ...]
Model = TypeVar("Model", bound="StrictModel")

MAX_NODES = 100_000  # a file that aliases itself into more is an attack, not a configuration


class StrictModel(BaseModel):
    """A configuration block: no unknown keys, no silent conversions, no later changes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    refused: ClassVar[Mapping[str, str]] = {}
    """Keys that this block does not have though somebody may look for them here, and what to do instead."""

    def mistakes(self) -> Iterable[tuple[Loc, str]]:
        """What no single field can see: (path below this block, what is wrong), one pair a mistake."""
        return ()


class Overlay(StrictModel):
    """Blocks that count only as far as they are written down: laid over others, and judged where they lie."""


def overlaid(base: Model, overlay: Model) -> Model:
    """`base` with every value that was written down in `overlay`, block by block; a list is replaced as a whole.

    A block that can be switched off and was written down takes part, unless it says otherwise.
    """
    if not overlay.model_fields_set:
        return base
    switch = type(overlay).model_fields.get("enable")
    changes: dict[str, Any] = {"enable": True} if switch is not None and switch.default is True else {}
    for name in overlay.model_fields_set:
        old, new = getattr(base, name), getattr(overlay, name)
        changes[name] = overlaid(old, new) if isinstance(new, StrictModel) and isinstance(old, type(new)) else new
    return base.model_copy(update=changes)


def _must_exist(path: Path, info: ValidationInfo) -> Path:
    if info.context and info.context.get("check_files") and not path.exists():
        near = difflib.get_close_matches(path.name, _names_beside(path), n=1)
        hint = f" (did you mean '{path.with_name(near[0])}'?)" if near else ""
        sentence = f"no such file or folder: '{path}', looked for from {Path.cwd()}{hint}"
        raise PydanticCustomError("missing_file", "{sentence}", {"sentence": sentence})
    return path


def _names_beside(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except OSError:
        return []


ExistingPath = Annotated[Path, AfterValidator(_must_exist)]
"""A file or folder that must be there before a run starts; relative paths start at the working directory."""


def load_config(
    kind: type[Model], path: Path | None, overrides: Sequence[str] = (), *, check_files: bool = True
) -> Model:
    """Read a YAML or JSON file (or none), lay `a.b=c` overrides over it, and check the whole.

    Raises:
        ConfigError: with one line for each mistake, those of the file in its own order, then those of the overrides.
    """
    source = _Source(path)
    for override in overrides:
        source.override(override)
    found: dict[tuple[Loc, str], None] = {}
    config, judged = _validate(kind, source.plain, check_files, found)
    for loc, message in () if config is None else all_mistakes(config, judged=judged):
        if not any(loc[:length] in judged for length in range(len(loc) + 1)):
            found[(loc, message)] = None
    if found or config is None:
        ordered = sorted(found, key=lambda mistake: source.place(mistake[0]))
        raise ConfigError("\n".join(source.describe(loc, message) for loc, message in ordered))
    return config


def json_schema(kind: type[StrictModel]) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def _validate(
    kind: type[Model], plain: Any, check_files: bool, found: dict[tuple[Loc, str], None]
) -> tuple[Model | None, set[Loc]]:
    """Validate; where that fails, note the mistakes, mend them and validate the rest for what they hid.

    A wrong value makes room for its default, or where it is required for a stand-in (a block, path or name); a file
    that is not there is taken as there. Returns the mended configuration, if one came about, and where it was mended.
    """
    judged = set[Loc]()
    for _ in range(8):  # as deep as blocks with required fields lie in each other, and more
        try:
            return kind.model_validate_json(json.dumps(plain), context={"check_files": check_files}), judged
        except ValidationError as error:
            details = error.errors()
        cut, absent = set[Loc](), set[Loc]()
        for detail in details:
            loc = _known(plain, detail["loc"])
            if detail["type"] == "missing":
                loc = (*loc, detail["loc"][-1])
            if not any(loc[:length] in judged for length in range(len(loc) + 1)):
                found[(loc, _message(kind, detail))] = None
            if detail["type"] == "missing" and isinstance(loc[-1], str):
                absent.add(loc)
            elif detail["type"] == "missing_file":
                check_files = False
            else:  # a list is cut as a whole, as its indices would move
                cut.add(loc[:-1] if loc and isinstance(loc[-1], int) else loc)
        if () in cut:
            break
        judged |= cut | absent
        plain = _mended(kind, plain, cut, absent)
    return None, judged


def _known(plain: Any, loc: Sequence[str | int]) -> Loc:
    """`loc` less the names of union members, which pydantic adds and no file contains."""
    place, kept = plain, list[str | int]()
    for part in loc:
        if isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
        elif isinstance(place, dict) and part in place:
            place = place[str(part)]
        else:
            continue
        kept.append(part)
    return tuple(kept)


def _mended(kind: type[StrictModel], plain: Any, cut: set[Loc], absent: set[Loc]) -> Any:
    """A copy of `plain` less the places to cut, with stand-ins at the absent ones: an empty block, or their path."""

    def copy(value: Any, loc: Loc) -> Any:
        if isinstance(value, list):
            return [copy(member, (*loc, index)) for index, member in enumerate(value)]
        if not isinstance(value, dict):
            return value
        kept = {key: copy(member, (*loc, key)) for key, member in value.items() if (*loc, key) not in cut}
        here = [place for place in absent if place[:-1] == loc]
        return kept | {place[-1]: {} if _models_at(kind, place) else ".".join(map(str, place)) for place in here}

    return copy(plain, ())


def all_mistakes(config: StrictModel, loc: Loc = (), judged: Set[Loc] = frozenset()) -> Iterator[tuple[Loc, str]]:
    """What `mistakes` of a configuration and of all its blocks find, with whole paths; overlays are left out.

    So is what rests on a value at a `judged` place, which only stands in for a wrong one.
    """
    if isinstance(config, Overlay):
        return
    for name, value in config:
        members = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, member in members:
            if isinstance(member, StrictModel):
                yield from all_mistakes(member, (*loc, name) if index is None else (*loc, name, index), judged)
    either, other = (list(_supposing(answer, config, loc, judged).mistakes()) for answer in (True, False))
    for below, message in either:
        if (below, message) in other:
            yield (*loc, *below), message


class _Anything:
    """In place of a wrong value: every question about it gets the same answer, whatever is made of it is itself."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer

    def _same(self, *_: object) -> Any:
        return self

    def _answer(self, *_: object) -> bool:
        return self.answer

    def __iter__(self) -> Iterator[Any]:
        return iter([self])

    def __len__(self) -> int:
        return 1

    def __format__(self, _: str) -> str:
        return "?"

    __hash__ = object.__hash__
    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _answer
    __getattr__ = __getitem__ = __call__ = __neg__ = __abs__ = _same
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _same
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _same


def _supposing(answer: bool, block: Any, loc: Loc, judged: Set[Loc]) -> Any:
    """The same block with anything at a judged place: what is a mistake by either answer does not depend on it."""
    if isinstance(block, list | tuple):
        return type(block)(_supposing(answer, member, (*loc, index), judged) for index, member in enumerate(block))
    if not isinstance(block, StrictModel) or not any(place[: len(loc)] == loc for place in judged):
        return block
    copy = block.model_copy()
    for name in type(block).model_fields:
        place = (*loc, name)
        copy.__dict__[name] = (
            _Anything(answer) if place in judged else _supposing(answer, getattr(block, name), place, judged)
        )
    return copy


class _Source:
    """A configuration as it was written, with the place of every key."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tree: Any = CommentedMap() if path is None else _parse_file(path)
        if not isinstance(self.tree, CommentedMap):
            raise ConfigError(f"{path}:1: a configuration is a mapping of keys to values, this is something else")
        self.plain: Any = _to_plain(self.tree, str(path))
        self.origins: dict[Loc, str] = {}

    def override(self, text: str) -> None:
        """Lay one `a.b=c` over the file; numbers in the path index lists."""
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"override '{text}': write it as key.path=value")
        parts: list[str | int] = [int(part) if part.isdigit() else part for part in key.strip().split(".")]
        place = self.plain
        for position, part in enumerate(parts):
            last = position == len(parts) - 1
            fits = isinstance(place, list) if isinstance(part, int) else isinstance(place, dict)
            if not fits or (isinstance(part, int) and part >= len(place)):
                raise ConfigError(f"override '{text}': '{'.'.join(map(str, parts[:position]))}' has no '{part}'")
            if last:
                place[part] = _parse_value(value, text)
            else:
                place = place[part] if isinstance(part, int) else place.setdefault(part, {})
        self.origins[tuple(parts)] = f"override '{text}'"

    def describe(self, loc: Loc, message: str) -> str:
        return f"{self._origin(loc)}: {'.'.join(map(str, loc)) or 'the whole'}: {message}"

    def _origin(self, loc: Loc) -> str:
        if override := self._override(loc):
            return override
        return "command line" if self.path is None else f"{self.path}:{self._mark(loc)[0] + 1}"

    def place(self, loc: Loc) -> tuple[int, int, int]:
        """Where a value stands, for sorting: in the file by line and column, or after it among the overrides."""
        override = self._override(loc)
        return (1, [*self.origins.values()].index(override), 0) if override else (0, *self._mark(loc))

    def _override(self, loc: Loc) -> str | None:
        return next((self.origins[loc[:end]] for end in range(len(loc), 0, -1) if loc[:end] in self.origins), None)

    def _mark(self, loc: Loc) -> tuple[int, int]:
        """Line and column of the value in the file, from 0; of what it would lie in, where it is missing."""
        tree, mark = self.tree, (0, 0)
        for part in loc:
            try:
                line, column = tree.lc.data[part][:2]
                tree, mark = tree[part], (line, column)
            except (AttributeError, KeyError, IndexError, TypeError):
                break
        return mark


def _parse_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        tree = _parse(text)
    except YAMLError as error:
        raise ConfigError(_syntax_message(str(path), error)) from error
    return CommentedMap() if tree is None else tree


def _parse(text: str) -> Any:
    """YAML 1.2, and JSON pasted between its keys: a comma that ends `"distillation": {...},` there is passed over.

    Only where the parser itself stumbles over such a comma is it blanked, so no value can change.
    """
    for _ in range(100):
        try:
            return YAML(typ="rt").load(text)
        except MarkedYAMLError as error:
            mark = error.problem_mark
            place = -1 if mark is None else mark.index
            rest = text[place + 1 :].partition("\n")[0]
            is_stray = place >= 0 and text[place : place + 1] == "," and text[:place].rstrip()[-1:] in ("}", "]", '"')
            if not is_stray or not re.fullmatch(r"\s*|\s+#.*", rest):
                raise
            text = f"{text[:place]} {text[place + 1 :]}"
    return YAML(typ="rt").load(text)


def _parse_value(value: str, override: str) -> Any:
    try:
        return _to_plain(YAML(typ="rt").load(value), f"override '{override}'")
    except YAMLError as error:
        raise ConfigError(_syntax_message(f"override '{override}'", error)) from error


def _syntax_message(where: str, error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{where}:{mark.line + 1}: column {mark.column + 1}: not YAML or JSON: {error.problem}"
    return f"{where}: not YAML or JSON: {' '.join(str(error).split())}"


def _to_plain(node: Any, where: str) -> Any:
    """The parsed tree as dict, list, str, int, float, bool and None, whatever classes carried its comments."""
    budget = [MAX_NODES]

    def convert(value: Any) -> Any:
        budget[0] -= 1
        if budget[0] < 0:
            raise ConfigError(f"{where}: more than {MAX_NODES} values; a configuration is never that large")
        if isinstance(value, TaggedScalar) or getattr(getattr(value, "tag", None), "value", None):
            raise ConfigError(f"{where}: tags such as '{value.tag.value}' have no meaning here; write plain values")
        if isinstance(value, CommentedMap | dict):
            return {str(key): convert(member) for key, member in value.items()}
        if isinstance(value, CommentedSeq | list):
            return [convert(member) for member in value]
        for kind in (bool, int, float, str):
            if isinstance(value, kind):
                return kind(value)
        return None if value is None else str(value)

    return convert(node)


def _message(kind: type[StrictModel], detail: ErrorDetails) -> str:
    """One mistake in plain words."""
    value, loc = detail["input"], detail["loc"]
    match detail["type"]:
        case "extra_forbidden":
            refusals = [model.refused[str(loc[-1])] for model in _models_at(kind, loc[:-1]) if loc[-1] in model.refused]
            return refusals[0] if refusals else f"unknown key{_suggest_key(kind, loc)}"
        case "missing":
            return "required, and missing"
        case "literal_error" | "enum":
            expected = detail["ctx"]["expected"]
            words = re.findall(r"'([^']*)'", expected)
            near = difflib.get_close_matches(str(value), words, n=1)
            return f"must be {expected}, got {value!r}" + (f" (did you mean '{near[0]}'?)" if near else "")
        case "model_type" | "tuple_type" | "list_type" if value is None:
            return "is empty; remove the line, or fill it"
        case "missing_file":
            return detail["msg"]
        case "value_error":
            return detail["msg"].removeprefix("Value error, ")
    text = detail["msg"].replace("Input should be", "must be").replace("Input should", "should")
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"{text[0].lower()}{text[1:]}, got {shown}"


def _suggest_key(kind: type[StrictModel], loc: Sequence[str | int]) -> str:
    """The nearest key of the same block, or the blocks where a key of that name does exist."""
    key = str(loc[-1])
    siblings = [name for model in _models_at(kind, loc[:-1]) for name in model.model_fields]
    near = difflib.get_close_matches(key, siblings, n=1)
    if near:
        return f" (did you mean '{near[0]}'?)"
    homes = [path for path in _all_paths(kind) if path.rsplit(".", 1)[-1] == key]
    if homes:
        return f" (did you mean '{homes[0]}'?)"
    return f" (there are {', '.join(siblings)})" if siblings else ""


def _models_at(kind: type[StrictModel], loc: Sequence[str | int]) -> list[type[StrictModel]]:
    models = [kind]
    for part in loc:
        fields = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    return models


def _models_in(annotation: Any) -> list[type[StrictModel]]:
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list, tuple, dict, Mapping):
        return [model for member in get_args(annotation) for model in _models_in(member)]
    return []


@cache
def _all_paths(kind: type[StrictModel], prefix: str = "") -> tuple[str, ...]:
    paths = list[str]()
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for model in _models_in(field.annotation):
            paths.extend(_all_paths(model, f"{prefix}{name}."))
    return tuple(paths)

"""Reading a config file; every mistake becomes one sentence with file, line, field and remedy."""

import difflib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails

from schemas.errors import GeoLinkError

M = TypeVar("M", bound=BaseModel)
_Lines = dict[tuple[str | int, ...], int]


def load_config(path: Path, model: type[M]) -> M:
    """Read a YAML (or JSON) file into a config model; relative paths become absolute.

    Raises GeoLinkError: file missing, not YAML, an unknown key (with the nearest valid one), a
    wrong type or value; all mistakes of a file are listed, each with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GeoLinkError(f"cannot read config {path}: {error}") from error
    try:
        data, lines = yaml.safe_load(text), _line_numbers(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise GeoLinkError(f"{where}: not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise GeoLinkError(f"{path}: a config is a mapping of keys to values, this file is not")
    return _absolute(validate_config(data, model, str(path), lines), path.parent.resolve())


def validate_config(
    values: Mapping[str, Any], model: type[M], where: str, lines: _Lines | None = None
) -> M:
    """A config of plain values; paths stay as they are.

    where: what the values come from. lines: of keys, by their path. Raises GeoLinkError as
    `load_config`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        messages = dict.fromkeys(_message(where, model, e, lines or {}) for e in error.errors())
        raise GeoLinkError("\n".join(messages)) from None


def _absolute(config: M, base: Path) -> M:
    """The config with every relative path taken from the config file's folder."""
    update: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Path):
            update[name] = base / value.expanduser()
        elif isinstance(value, BaseModel):
            update[name] = _absolute(value, base)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            update[name] = tuple(_absolute(part, base) for part in value)
        elif name in ("rasters", "pbf") and value is not None:
            update[name] = tuple(v if "://" in v else str(base / v) for v in value)
        elif name in ("stac", "start") and isinstance(value, str):
            elsewhere = "://" in value or value.startswith("timm:")
            update[name] = value if elsewhere else str(base / value)
    return config.model_copy(update=update)


def _line_numbers(text: str) -> _Lines:
    """Line of every key and list entry by its path in the document."""
    lines: _Lines = {}

    def walk(node: yaml.Node, at: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                lines[(*at, key.value)] = key.start_mark.line + 1
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for i, value in enumerate(node.value):
                lines[(*at, i)] = value.start_mark.line + 1
                walk(value, (*at, i))

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return lines


def _message(path: str, model: type[BaseModel], error: ErrorDetails, lines: _Lines) -> str:
    loc, owner = _readable(model, error["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"{path}:{line}" if line else path
    field = ".".join(str(p) for p in loc)
    if error["type"] == "extra_forbidden":
        allowed = list(owner.model_fields)
        near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{where}: unknown key {field!r}; {hint}"
    if error["type"] == "missing":
        return f"{where}: key {field!r} is missing"
    text = error["msg"].removeprefix("Value error, ")
    given = error["input"]
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {field}: {text}{shown}" if field else f"{where}: {text}"


def _readable(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[tuple[int | str, ...], type[BaseModel]]:
    """The location without pydantic's union labels, and the model that owns its last part."""
    path: list[int | str] = []
    owner = model
    for i, part in enumerate(loc):
        if path and isinstance(part, str) and part in _union_labels(owner, path[-1]):
            owner = _union_labels(owner, path[-1])[part] or owner
            continue
        if path and isinstance(part, int):
            owner = _entry_model(owner, path[-1]) or owner
        path.append(part)
        if i < len(loc) - 1 and isinstance(part, str) and part in owner.model_fields:
            models = [m for m in _union_labels(owner, part).values() if m]
            if len(models) == 1:
                owner = models[0]
    return tuple(path), owner


def _entry_model(owner: type[BaseModel], field: int | str) -> type[BaseModel] | None:
    """The model of the entries of a field that is a list of models."""
    known = isinstance(field, str) and field in owner.model_fields
    entries = get_args(owner.model_fields[str(field)].annotation) if known else ()
    return next((e for e in entries if isinstance(e, type) and issubclass(e, BaseModel)), None)


def _union_labels(owner: type[BaseModel], field: int | str) -> dict[str, type[BaseModel] | None]:
    if not isinstance(field, str) or field not in owner.model_fields:
        return {}
    annotation = owner.model_fields[field].annotation
    union = get_origin(annotation) in (Union, types.UnionType)
    labels: dict[str, type[BaseModel] | None] = {}
    for option in get_args(annotation) if union else (annotation,):
        base, *tags = get_args(option) if hasattr(option, "__metadata__") else (option,)
        label = next((t.tag for t in tags if isinstance(t, Tag)), getattr(base, "__name__", ""))
        is_model = isinstance(base, type) and issubclass(base, BaseModel)
        labels[label] = base if is_model else None
    return labels

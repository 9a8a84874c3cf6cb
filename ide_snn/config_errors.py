"""Hydra's and OmegaConf's errors as one message that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ide_snn.schemas import LABELS, SCHEMAS

__all__ = ["ConfigError", "explain", "one_error", "refuse_added_keys"]

# what Hydra's errors do not say
HINTS = {
    "Could not find 'encoder/delta'": "(Delta encodes sequences of your own, in Python: ide_snn.encoding.Delta)",
    "Could not load 'hydra/launcher/": "(launchers need pip install -e '.[sweep]')",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the option."""


@contextmanager
def one_error() -> Iterator[None]:
    """Hydra's and OmegaConf's errors as ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def explain(error: BaseException) -> str:
    """What is wrong and what would be right, in one message."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if isinstance(cause, MissingMandatoryValue):
        return f"required: {cause.full_key}=..."
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return _explain_unknown(cause)
    if cause is not None and cause.full_key:
        text = str(cause).splitlines()[0]
        is_no_list = text.endswith("is not a ListConfig, list or tuple.")
        return f"{cause.full_key}: {text}" + (f" A list is written as {cause.full_key}=[1,2]" if is_no_list else "")
    group = re.match(r"Could not override '([^']+)'\.?\s+No match in the defaults list", str(error))
    if group is not None:
        return f"unknown option {group[1]}: this command has no such group; --help lists its options"
    text, *_ = str(error).split("\nConfig search path:")
    hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, text)), "")
    return " ".join(f"{text} {hint}".split())


def _explain_unknown(error: OmegaConfBaseException) -> str:
    prefix, _, key = str(error.full_key).rpartition(".")
    if is_dataclass(error.object_type):
        valid = [field.name for field in fields(error.object_type)]
    else:
        valid = [str(name) for name in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    return _unknown(prefix, key, valid)


def _unknown(prefix: str, key: str, valid: Sequence[str]) -> str:
    where = f"{prefix}." if prefix else ""
    close = [f"{where}{name}" for name in difflib.get_close_matches(key, valid, n=1)]
    if not prefix and set(SCHEMAS) <= set(valid):  # of a training run, whose options lie in groups
        close = [f"{group}.{key}" for group, members in SCHEMAS.items() if _is_option(key, members)] or close
        close += [f"{group}=..., {group}.<option>=..." for group, members in SCHEMAS.items() if key in members]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"unknown option {where}{key}{hint}; valid are {', '.join(f'{where}{name}' for name in valid)}"


def _is_option(key: str, members: Mapping[str, type]) -> bool:
    return key not in LABELS and any(key == field.name for kind in members.values() for field in fields(kind))


def refuse_added_keys(node: Any, prefix: str) -> None:
    """`+key=value` can add an option that no schema has."""
    if not isinstance(node, DictConfig) or node._is_none():
        return
    kind = OmegaConf.get_type(node)
    names = [field.name for field in fields(kind)] if kind is not None and is_dataclass(kind) else None
    for key in map(str, node):
        if names is not None and key not in names:
            raise ConfigError(_unknown(prefix.rstrip("."), key, names))
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            refuse_added_keys(node[key], f"{prefix}{key}.")

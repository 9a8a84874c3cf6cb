"""Hydra's and OmegaConf's errors as one message that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

__all__ = ["ConfigError", "explain", "one_error", "refuse_added_keys"]


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
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    group = re.match(r"Could not override '([^']+)'\.?\s+No match in the defaults list", str(error))
    if group is not None:
        return f"unknown option {group[1]}: this command has no such group; --help lists its options"
    text, *_ = str(error).split("\nConfig search path:")
    return " ".join(text.split())


def _explain_unknown(error: OmegaConfBaseException) -> str:
    prefix, _, key = str(error.full_key).rpartition(".")
    if is_dataclass(error.object_type):
        valid = [field.name for field in fields(error.object_type)]
    else:
        valid = [str(name) for name in error.parent_node] if isinstance(error.parent_node, DictConfig) else []
    return _unknown(prefix, key, valid)


def _unknown(prefix: str, key: str, valid: Sequence[str]) -> str:
    where = f"{prefix}." if prefix else ""
    close = difflib.get_close_matches(key, valid, n=1)
    hint = f" (did you mean {where}{close[0]}?)" if close else ""
    return f"unknown option {where}{key}{hint}; valid are {', '.join(f'{where}{name}' for name in valid)}"


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

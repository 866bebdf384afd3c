"""Policies in a text, as the command line spells them: params-only:latest:2 for params_only(latest(2))."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

from ckptmgr import policies as policy

_POLICIES: Mapping[str, Callable[..., policy.KeepPolicy]] = {
    each.__name__: each
    for each in (policy.latest, policy.best, policy.every_steps, policy.every_seconds, policy.params_only)
}
_PLAIN = """'[^']*'|"[^"]*"|[^()'"]"""
_CALL = re.compile(rf"""\b(?:{"|".join(_POLICIES)})\((?:{_PLAIN}|\((?:{_PLAIN})*\))*\)""")


def in_shell_words(text: str) -> str:
    """The text with each repr of a policy spelled as in --policy."""
    return _CALL.sub(lambda found: _spelled(found.group()), text)


def _spelled(repr_: str) -> str:
    try:
        return policy.spell(_value(ast.parse(repr_, mode="eval").body))
    except (SyntaxError, ValueError, TypeError, KeyError):
        return repr_


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    return _POLICIES[name](
        *map(_value, node.args), **{str(each.arg): _value(each.value) for each in node.keywords}
    )

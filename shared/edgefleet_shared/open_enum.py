"""Enums of what is told and kept: receives a word, hands on its member; one that only a newer program knows is kept as it is. Pure."""

from __future__ import annotations

from enum import Enum
from typing import Any


class OpenEnum(str, Enum):
    """An enum that goes on being read when somebody newer says what is not in it: that is kept in its words, and equal to no member.

    A controller that is older than its boards must go on hearing them, and an agent that is returned to must read what the newer one kept.
    Where it is acted upon, :func:`is_known` is asked, or what is not known is no success.
    """

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        told = str.__new__(cls, value)
        told._name_, told._value_ = "UNKNOWN", value
        return told


def is_known(member: OpenEnum) -> bool:
    """Whether it is one of its enum's own."""
    return member._name_ in type(member).__members__

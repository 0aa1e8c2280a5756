"""JSON out of bytes that nobody vouches for: a disk's, a child's, a stranger's. Says what ``msgspec`` raises of those that can't be read.

Not all of it is its own: of text that is no UTF-8 it lets Python's error through, and of what is nested too deeply.
"""

from __future__ import annotations

import msgspec

MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

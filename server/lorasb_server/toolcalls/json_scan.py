"""Finds where a JSON object ends, however its text is cut into pieces."""

import re

_SPECIAL = re.compile(r'["\\{}\[\]]')


class ObjectScanner:
    """Follows brackets outside strings; `depth` of them are open before the first piece."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """The number of characters up to the end of the object, None where it is not there yet."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            found = _SPECIAL.search(text, at)
            if found is None:
                return None
            at = found.end()
            if self._take(found[0]):
                return at
        return None

    def _take(self, sign: str) -> bool:
        """Whether this bracket closes the outermost one."""
        if self._in_string:
            self._escaped = sign == "\\"
            self._in_string = sign != '"'
        elif sign == '"':
            self._in_string = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1
            return self._depth <= 0
        return False

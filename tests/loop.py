"""The event loop of the tests."""

from __future__ import annotations

import warnings

import uvloop


class Loop(uvloop.Loop):
    """The loop of production; a test that leaves a transport open fails, and says which.

    uvloop warns of it in `close`. Where warnings are errors it would not close that transport then, and wait for it
    until the test's time is up.
    """

    def close(self) -> None:
        with warnings.catch_warnings(record=True) as left:
            warnings.simplefilter("always")
            super().close()
        assert not left, "; ".join(str(warning.message) for warning in left)

"""What is put into a routine's text (store/routines.py)."""

from __future__ import annotations

import re

import pytest

from fastworker.store.routines import Routine, packaged


@pytest.mark.parametrize("routine", packaged(), ids=lambda one: one.name)
def test_nothing_is_left_open(routine: Routine) -> None:
    """In PL/pgSQL `$1` of a statement that was put in as it is would be the routine's own first argument."""
    assert "{{" not in routine.sql
    assert "LANGUAGE plpgsql" not in routine.sql or not re.search(r"\$\d", routine.sql)

"""stub"""
from __future__ import annotations
from fastworker.event import Record
def lexicon_record(record: Record) -> Record:
    return record

"""Which frames of a relay are believed, and from where on it is asked again: the reader's pure part."""

from __future__ import annotations

from fastworker.reader.gate import MALFORMED_IN_A_ROW, SEQ_JUMP, Gate, Jump

LAST, FAR = 100, 101 + SEQ_JUMP


def test_a_jump_waits_for_the_next_frame() -> None:
    gate = Gate()
    assert gate.jump(FAR, LAST, b"far", is_announced=False) == (Jump.DOUBTED, (FAR, b"far"))
    assert gate.jump(FAR + 1, LAST, b"next", is_announced=False) == (Jump.GAP, (FAR, b"far"))
    assert gate.doubted is None


def test_one_absurd_seq_is_malformed() -> None:
    gate = Gate()
    gate.jump(FAR, LAST, b"far", is_announced=False)
    assert gate.jump(LAST + 1, LAST, b"next", is_announced=False) == (Jump.MALFORMED, (FAR, b"far"))
    assert gate.doubted is None


def test_after_two_absurd_ones_the_second_waits() -> None:
    gate = Gate()
    gate.jump(FAR + 5, LAST, b"far", is_announced=False)
    assert gate.jump(FAR, LAST, b"less", is_announced=False) == (Jump.BOTH_WRONG, (FAR + 5, b"far"))
    assert gate.doubted == (FAR, b"less")


def test_an_announced_jump_is_believed() -> None:
    gate = Gate()
    assert gate.jump(FAR, LAST, b"far", is_announced=True)[0] is Jump.BELIEVED
    assert gate.doubted is None


def test_malformed_frames_in_a_row_end_a_connection_each_time_after_twice_as_many() -> None:
    gate = Gate()

    def frames_until_given_up() -> int:
        for count in range(1, 10_000):
            gate.malformed()
            if gate.gives_up():
                return count
        raise AssertionError

    assert frames_until_given_up() == MALFORMED_IN_A_ROW
    assert frames_until_given_up() == 2 * MALFORMED_IN_A_ROW
    gate.malformed()
    gate.good()
    gate.passed()
    assert frames_until_given_up() == MALFORMED_IN_A_ROW


def test_a_frame_too_large_is_passed_over_by_as_little_as_it_takes() -> None:
    """The large one is 37 seqs further: the skip ends at 37 whichever way it goes there."""
    gate, large = Gate(), 37
    for _ in range(20):
        if gate.skip < large:
            gate.pass_over()  # it came again
        elif not gate.is_too_far():
            break
    assert gate.skip == large
    gate.no_skip()
    assert gate.skip == 0

"""Whether a relay has fallen silent, judged by its own rate. No I/O."""

from __future__ import annotations

from typing import Final


class SilenceWatch:
    """Judges silence by the stream's own rate: a busy relay is silent after seconds, a quiet one after hours.

    The rate is a moving average over the stretches in which data came. A silence that ended a connection counts as a
    gap, too, so that a relay which fell quiet is left in peace after one or two reconnections.
    """

    WEIGHT: Final = 0.1
    UNKNOWN_S: Final = 300.0
    NOTICE_S: Final = 6.0
    """A silence that people are told of: well below what ends a connection."""

    def __init__(self, floor_s: float) -> None:
        self._floor_s = floor_s
        self._since = 0.0
        self._data_at: float | None = None
        self._usual_gap_s: float | None = None  # of data alone: no silence makes a longer one usual
        self.mean_gap_s: float | None = None

    def opened(self, now: float) -> None:
        self._since = now
        if self._data_at is None:
            self._data_at = now

    def saw(self, now: float, frames: int) -> None:
        if frames:
            self._sample((now - self._since) / frames)
            self._usual_gap_s = self.mean_gap_s
            self._since = self._data_at = now

    def deaf(self, now: float) -> None:
        """We do not read just now (the stream is full): the silence is ours, not the relay's."""
        self._since = self._data_at = now

    def without_data_s(self, now: float) -> float:
        """Seconds since the newest data, over all connections."""
        return 0.0 if self._data_at is None else now - self._data_at

    def is_silent(self, now: float) -> bool:
        usual = self.UNKNOWN_S if self._usual_gap_s is None else max(self.NOTICE_S, 100 * self._usual_gap_s)
        return self.without_data_s(now) > usual

    def gave_up(self, now: float) -> None:
        self._sample(now - self._since)

    def silent_for(self, now: float) -> float:
        return now - self._since

    def limit_s(self) -> float:
        """Seconds without data that end a connection."""
        if self.mean_gap_s is None:
            return max(self._floor_s, self.UNKNOWN_S)
        return max(self._floor_s, 100 * self.mean_gap_s)

    def _sample(self, gap_s: float) -> None:
        known = self.mean_gap_s
        self.mean_gap_s = gap_s if known is None else known + self.WEIGHT * (gap_s - known)

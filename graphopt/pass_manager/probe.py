"""The text that verification uses when none is given."""

from __future__ import annotations

PROBE_TEXT = """\
The harbour was quiet on the morning the survey began. Two engineers carried a tripod along the \
pier, stopped every forty metres, and wrote down the height of the water and the time. By noon \
they had nineteen readings, a sunburn, and a disagreement about whether the third gauge had been \
read from the wrong side. They settled it the way such things are settled: they walked back, took \
the measurement again, and found that both of them had been right about something.

A tide is easy to describe and hard to predict. The moon pulls on the ocean, the sun pulls a \
little less, and the shape of the coast decides what the pull becomes. In a narrow bay the water \
can rise twelve metres in six hours; a day's sail away it hardly moves at all. Tables of high and \
low water were once computed by machines of brass wheels and wire, one wheel for each rhythm of \
the sky. A clerk turned the crank, and a pen drew next year's tides on a roll of paper.

To keep such a machine honest, someone had to compare the drawing with the sea. If the curve said \
4.2 metres at 07:15 and the gauge said 3.9, the difference was entered in a ledger, and after a \
month the wheels were adjusted. Nobody expected the error to vanish. What mattered was that it was \
known, that it did not grow, and that a captain who trusted the table would not find his ship on \
the rocks.
"""
"""Plain English prose with figures and punctuation, some 300 tokens in most vocabularies."""

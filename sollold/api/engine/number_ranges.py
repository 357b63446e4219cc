"""Ranges of numbers in requests, in every dialect: engines misread other numbers, or crash."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""A 64-bit integer, as engines read them."""
Small = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
"""A 32-bit integer, as llama.cpp reads most of them: a larger one would overflow."""
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Limit = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""Maximum tokens of an answer. More than engines can count to means no limit."""
LimitOrNone = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
"""The same, with -1 for no limit, as in llama.cpp and others."""
Dimensions = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
"""A share of the probability, such as ``top_p`` or ``min_p``."""
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=100)]
"""A divisor of scores, so not 0."""
Factor = Annotated[float, Meta(ge=0, le=1000)]
"""A sampler's parameter that has no bound of its own."""
Finite = Annotated[float, Meta(ge=-1000, le=1000)]
Mirostat = Annotated[int, Meta(ge=0, le=2)]

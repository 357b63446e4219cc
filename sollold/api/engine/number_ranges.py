"""The numbers that requests may name, in every dialect: engines misread others, or die of them."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""What engines read a whole number into."""
Small = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
"""What llama.cpp reads most whole numbers into: a larger one would become another."""
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Limit = Annotated[int, Meta(ge=1, le=2**63 - 1)]
"""Tokens of an answer. More than engines can count to means that there is no limit."""
LimitOrNone = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
"""Likewise, and -1 for none, as llama.cpp and others have it."""
Dimensions = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=128)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Temperature = Annotated[float, Meta(ge=0, le=100)]
Share = Annotated[float, Meta(ge=0, le=1)]
"""Of the probability: ``top_p``, ``min_p`` and their like."""
Penalty = Annotated[float, Meta(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Meta(gt=0, le=100)]
"""Scores are divided by it."""
Factor = Annotated[float, Meta(ge=0, le=1000)]
"""Of a sampler that has no other bound."""
Finite = Annotated[float, Meta(ge=-1000, le=1000)]
Mirostat = Annotated[int, Meta(ge=0, le=2)]

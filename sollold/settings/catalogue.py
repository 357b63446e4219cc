"""All settings, by key."""

from __future__ import annotations

import functools
import typing
from operator import attrgetter

from sollold.did_you_mean import did_you_mean
from sollold.facts import dataclass
from sollold.settings.schema import Settings

nearest = functools.partial(did_you_mean, alike=0.5)
"""A hint at the closest key or value."""
SECRETS = ("cluster.token", "cluster.old_tokens")
"""Keys whose values are never shown."""
FOREIGN_VARIABLES = {"llama.rpc_backends": "RPC_BACKENDS"}
"""Variables that other programs use for the same purpose; our own take precedence."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A settings key: its name, type annotation and default."""

    section: str
    name: str
    kind: object
    default: object

    @property
    def key(self) -> str:
        """``section.name``."""
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """Environment variable that sets it."""
        return f"SOLLOLD_{self.section}_{self.name}".upper()


@functools.cache
def catalogue() -> dict[str, Setting]:
    """Return all settings by key."""
    found: dict[str, Setting] = {}
    for section, part in typing.get_type_hints(Settings).items():
        for name, kind in typing.get_type_hints(part, include_extras=True).items():
            setting = Setting(section, name, kind, attrgetter(f"{section}.{name}")(Settings()))
            found[setting.key] = setting
    return found

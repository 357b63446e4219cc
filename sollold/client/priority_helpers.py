"""Named priorities, and the priorities of roles and kinds of work, from the daemon's table."""

from __future__ import annotations

from enum import IntEnum

from sollold.priority import NORMAL, ROLES, TASKS


class Priority(IntEnum):
    """Priority of a request, 1 (lowest) to 10 (highest). Higher ones leave the queue first."""

    BATCH = 1
    LOWEST = 2
    LOW = 3
    BELOW_NORMAL = 4
    NORMAL = 5
    ABOVE_NORMAL = 6
    HIGH = 7
    HIGHER = 8
    URGENT = 9
    CRITICAL = 10


def get_priority_for_role(role: str, default: int = NORMAL) -> int:
    """The priority of an agent's role; ``default`` for an unknown role."""
    return ROLES.get(role.strip().lower(), default)


def get_priority_for_task(task_type: str, default: int = NORMAL) -> int:
    """The priority of a kind of work; ``default`` for an unknown kind."""
    return TASKS.get(task_type.strip().lower(), default)


def list_available_roles() -> list[str]:
    """The known roles, most urgent first."""
    return sorted(ROLES, key=lambda role: -ROLES[role])


def list_available_tasks() -> list[str]:
    """The known kinds of work, most urgent first."""
    return sorted(TASKS, key=lambda task: -TASKS[task])

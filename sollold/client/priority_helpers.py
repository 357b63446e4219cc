"""Priorities by name, and what roles and kinds of work have. The table is the server's."""

from __future__ import annotations

from enum import IntEnum

from sollold.priority import NORMAL, ROLES, TASKS


class Priority(IntEnum):
    """1 (last) to 10 (first). Waiting requests with a higher one go first."""

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
    """The priority of an agent's role; ``default`` for a role that is not in the table."""
    return ROLES.get(role.strip().lower(), default)


def get_priority_for_task(task_type: str, default: int = NORMAL) -> int:
    """The priority of a kind of work; ``default`` for one that is not in the table."""
    return TASKS.get(task_type.strip().lower(), default)


def list_available_roles() -> list[str]:
    """The roles that have a priority, the most urgent first."""
    return sorted(ROLES, key=lambda role: -ROLES[role])


def list_available_tasks() -> list[str]:
    """The kinds of work that have a priority, the most urgent first."""
    return sorted(TASKS, key=lambda task: -TASKS[task])

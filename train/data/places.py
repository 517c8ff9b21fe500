"""Place of a run in its data, and whether other data are the same until there.

The data of a run may change where it has not read yet: a data set that joins later changes no example before.
"""

from collections.abc import Mapping
from typing import Any

from train.data.mixture import ExampleOrder, facts_before


def place(state: Mapping[str, Any]) -> int:
    """First example after all that a run has read or begun to read. state: of all rows (`TrainingData.get_state`)."""
    return max(lane["next"] + (lane["piece"] > 0) for lane in state["lanes"].values())


def first_unread(state: Mapping[str, Any]) -> int:
    """First example that a run has not read to its end. Rows are not equally far."""
    return min(lane["next"] for lane in state["lanes"].values())


def difference(
    order: ExampleOrder, options: Mapping[str, Any] | None, state: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
    """Returns the first fact about the data until the state's place that differs, as (name, of the state, now).

    options: what else the batches depend on; None: compare the orders only. The state must be of all rows.
    None: the run can resume at its place.
    """
    until, facts = place(state), state["depends_on"]
    of_order = {key: value for key, value in facts.items() if key in ("seed", "order") or key.startswith("source ")}
    now, then = order.fingerprint(until), facts_before(of_order if options is None else facts, until)
    now |= options or {}
    for key in sorted(now | then):
        if now.get(key) != then.get(key):
            return key, then.get(key), now.get(key)
    # What changes later must not have moved the seeds of shuffles.
    before = state["sources"]
    for name in order.sources_before(until):
        if before.get(name) != order.sources[name]:
            return f"group and shuffle of {name}", before.get(name), order.sources[name]
    return None

"""examples/ring_attention.py with something wrong, or counted: ring_with_faults.py FAULT [the example's arguments]."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import ring_attention as ring

import rau
from rau.distributed.ring import _Plan

VICTIM = 1


def at_its_second_call(name, happens):
    """Let something happen to the victim instead of its second call of a function: in the middle of the ring."""
    original, calls = getattr(ring, name), []

    def patched(*arguments):
        calls.append(None)
        if ring.RANK == VICTIM and len(calls) == 2:
            happens()
        return original(*arguments)

    setattr(ring, name, patched)


def no_triangle():
    right = _Plan.visible

    def visible(plan, source):
        return (None, None, False) if source == ring.RANK else right(plan, source)

    _Plan.visible = visible


def one_step_without_gradient_of_keys():
    right, calls = ring.attend_backward, []

    def attend_backward(*arguments):
        dq, dk, dv = right(*arguments)
        calls.append(None)
        return dq, dk * (len(calls) % ring.RANKS != 1), dv

    ring.attend_backward = attend_backward


def count(folder):
    """Write the bytes that the updates read and write, and those of the messages, of both of the example's runs."""
    found = {"merge": 0, "sent": 0}
    update, exchange = rau.StreamingMerge.update, ring.dist.batch_isend_irecv

    def counted_update(self, *partial, tokens=None):
        update(self, *partial, tokens=tokens)
        running = sum(part.nbytes for part in self.running) * (0.5 if tokens == "back" else 1)
        found["merge"] += sum(part.nbytes for part in partial) + 2 * running

    def counted_exchange(operations):
        found["sent"] += sum(operation.tensor.nbytes for operation in operations if operation.op is ring.dist.isend)
        return exchange(operations)

    rau.StreamingMerge.update, ring.dist.batch_isend_irecv = counted_update, counted_exchange
    status = ring.main()
    Path(folder, f"{ring.RANK}.json").write_text(json.dumps(found))
    return status


FAULTS = {
    "dies": lambda: at_its_second_call("attend", lambda: os._exit(7)),
    "dies-backward": lambda: at_its_second_call("attend_backward", lambda: os._exit(7)),
    "hangs": lambda: at_its_second_call("attend", lambda: time.sleep(600)),
    "mask": no_triangle,
    "gradient": one_step_without_gradient_of_keys,
}

if __name__ == "__main__":
    fault = sys.argv.pop(1)
    if fault == "count":
        sys.exit(count(sys.argv.pop(1)))
    FAULTS[fault]()
    sys.exit(ring.main())

"""The ranks of a process group during one call: what they tell one another, and how long they wait for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rau.constraints.hints import described
from rau.constraints.rules import Violations
from rau.errors import LostRankError, shown

_DEVICES = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}  # of the tensors that a backend moves
_FRAME, _HEAD = 1024, 8  # bytes of a description that all ranks exchange at once, and of its length


class Ranks:
    """The ranks of a group, one of which is this process.

    Parameters
    ----------
    call : str
        Name of the public function, for messages.
    group : torch.distributed.ProcessGroup, optional
        The default group where it is None.
    timeout : float, optional
        Seconds to wait for another rank; the group's own where it is None.

    Raises
    ------
    OptionError
        If there is no such group, if this process is not in it, or for a `timeout` that is no positive number.
    """

    def __init__(self, call: str, group: Any, timeout: Any) -> None:
        report = Violations(call)
        if not dist.is_available() or not dist.is_initialized():
            report.add("group", "torch.distributed is not initialised; call torch.distributed.init_process_group first.")
        elif group is not None and not isinstance(group, dist.ProcessGroup):
            report.add("group", f"group is {described(group)}; expected a torch.distributed.ProcessGroup of which this rank "
                       "is a member, or None for the default group. torch.distributed.new_group returns something else to "
                       "ranks that are not members.")  # fmt: skip
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < 1e9):
            report.add("timeout", f"timeout = {shown(timeout)}; expected a positive number of seconds, or None for the "
                       "group's own.")  # fmt: skip
        report.raise_if_broken()
        self.call = call
        self.group: Any = dist.group.WORLD if group is None else group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._backend = dist.get_backend(self.group)
        self._timeout = None if timeout is None else timedelta(seconds=timeout)

    @contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Turn what torch.distributed raises when a rank is gone, or silent for too long, into one clear error."""
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise LostRankError(
                f"{self.call}: rank {self.rank} of {self.size}: a rank is lost or too slow, {doing}: {reason.rstrip('.')}. "
                "The group cannot be used any more: end this process, or make a new group of the ranks that are left."
            ) from error

    def wait(self, works: Sequence[Any], doing: str) -> None:
        """Wait for what torch.distributed has begun."""
        with self.waiting(doing):
            for work in works:
                work.wait() if self._timeout is None else work.wait(self._timeout)

    def gather(self, mine: Tensor, doing: str) -> list[Tensor]:
        """Return every rank's tensor, all of the same size."""
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        if not mine.numel():
            return everyone
        with self.waiting(doing):
            work = dist.all_gather(everyone, mine, group=self.group, async_op=True)
        self.wait([work], doing)
        return everyone

    def deal(self, mine: Tensor, sent: Sequence[int], received: Sequence[int], doing: str) -> Sequence[Tensor]:
        """Send each rank so many bytes of a tensor; return the so many that each has sent."""
        theirs = mine.new_empty(sum(received))
        with self.waiting(doing):
            work = dist.all_to_all_single(theirs, mine, list(received), list(sent), group=self.group, async_op=True)
        self.wait([work], doing)
        return theirs.split(list(received))

    def begin(self, moves: Sequence[tuple[str, Tensor, int]], doing: str) -> list[Any]:
        """Begin to move tensors: ("to" or "from", tensor, rank) each. Those without elements do not move."""
        operations = [
            dist.P2POp(dist.isend if way == "to" else dist.irecv, tensor, dist.get_global_rank(self.group, rank), self.group)
            for way, tensor, rank in moves
            if tensor.numel()
        ]
        with self.waiting(doing):
            return dist.batch_isend_irecv(operations) if operations else []

    def agree(self, describe: Callable[[], tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], list[Any]]:
        """Have all ranks describe their part of the call before anything else is sent.

        `describe` returns what has to be the same on all ranks, by name, None where this rank has no say, and what need not
        be. Returned are what all agree on, and every rank's own part. The "device" is checked to be one that the group moves.

        A rank whose part is refused tells the others, which would otherwise wait for it: each raises a ConstraintError.
        """
        refused: Exception | None = None
        try:
            alike, own = describe()
            words: dict[str, Any] = {"alike": {"call": self.call, **alike}, "own": own}
        except Exception as error:  # whatever it is, the others are waiting
            refused = error
            words = {"refused": f"{type(error).__name__}: {error}"}
        said = self._exchange(words)
        if refused is not None:
            raise refused
        report = Violations(self.call)
        for rank, its in enumerate(said):
            if "refused" in its:
                report.add("ranks", f"rank {rank} refused its part of the call: {its['refused']}")
        report.raise_if_broken()
        names = list(said[self.rank]["alike"])
        if any(its["alike"]["call"] != self.call for its in said):
            names = ["call"]
        agreed: dict[str, Any] = dict.fromkeys(names)
        for name in names:
            ranks_of: dict[str, list[str]] = {}
            for rank, its in enumerate(said):
                if its["alike"][name] is not None:
                    agreed[name] = its["alike"][name]
                    ranks_of.setdefault(json.dumps(its["alike"][name]), []).append(str(rank))
            if len(ranks_of) > 1:
                found = ", ".join(f"{value} on rank {', '.join(ranks)}" for value, ranks in ranks_of.items())
                report.add("ranks", f"{name} is {found}; expected the same on all ranks.")
        device = agreed.get("device")
        if device is not None and device != _DEVICES.get(self._backend, device):
            report.add("array-device", f"tensors are on {device}; expected {_DEVICES[self._backend]}, which is what the group's "
                       f"backend moves, {self._backend}. Move them, or make a group of another backend.")  # fmt: skip
        report.raise_if_broken()
        return agreed, [its["own"] for its in said]

    def _exchange(self, words: dict[str, Any]) -> list[dict[str, Any]]:
        data = json.dumps(words).encode()
        framed, size = len(data).to_bytes(_HEAD, "little") + data, _FRAME
        device = _DEVICES.get(self._backend, "cpu")
        while True:
            mine = torch.frombuffer(bytearray(framed[:size].ljust(size, b"\0")), dtype=torch.uint8).to(device)
            frames = [bytes(each.tolist()) for each in self.gather(mine, "describing this call to the others")]
            lengths = [int.from_bytes(each[:_HEAD], "little") for each in frames]
            if _HEAD + max(lengths) <= size:
                return [json.loads(each[_HEAD : _HEAD + length]) for each, length in zip(frames, lengths, strict=True)]
            size = _HEAD + max(lengths)  # once more, whole

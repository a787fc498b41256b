"""The device table of cores: one row (slot) for each resident adapter version, leased by requests.

Not safe for several threads: the engine's own thread is the only one that touches it.
"""

from collections import OrderedDict

import torch

from lorasb_runtime.adapters.names import AdapterName
from lorasb_runtime.errors import InputError
from lorasb_runtime.ops.core_matmul import resident_cores

BASE_SLOT = 0


class SlotTable:
    """cores: [slots, D] on the device, scaled; slot 0 is the base model, all zeros for ever.

    fills[slot] counts how often the slot got new cores: slot and count name its content.

    A version stays in its slot while leased and, after that, until its slot is needed: the least
    recently used version that is neither leased nor pinned goes first.
    """

    def __init__(
        self,
        slots: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        scaling: float = 1.0,
        pins: frozenset[AdapterName] = frozenset(),
    ) -> None:
        """scaling: the basis's, by which cores are multiplied on their way into a slot.

        pins: the last leased version of each of these adapters stays in its slot.
        """
        if slots < 2:
            raise InputError(f"slots: found {slots}, expected at least 2 (slot 0 is the base)")
        if len(pins) > slots - 2:
            raise InputError(
                f"slots: found {slots} for {len(pins)} pinned adapters, expected at least "
                f"{len(pins) + 2}: one more for the base and one for all others"
            )
        self.cores = torch.zeros(slots, size, dtype=dtype, device=device)
        self._scaling = scaling
        self.fills = [0] * slots
        self.hits = 0  # leases of a version that was resident
        self.evictions = 0
        self._free = list(range(slots - 1, BASE_SLOT, -1))
        self._slot_of: dict[str, int] = {}
        self._version_of: dict[int, str] = {}
        self._leases: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._pins: dict[AdapterName, int | None] = dict.fromkeys(pins)

    @property
    def capacity(self) -> int:
        """Adapter versions that can be resident at once."""
        return self.cores.shape[0] - 1

    @property
    def used(self) -> int:
        return len(self._slot_of)

    @property
    def leased(self) -> int:
        return len(self._leases)

    def lease(
        self, version: str, cores: torch.Tensor, name: AdapterName | None = None
    ) -> int | None:
        """The slot that holds `version`, filled from an adapter's `cores` [D] if need be.

        None when every slot is leased to another version. Each lease is given back by `release`.
        `name` matters to pins alone.
        """
        slot = self._slot_of.get(version)
        if slot is not None:
            self.hits += 1
        else:
            slot = self._take()
            if slot is None:
                return None
            self.cores[slot].copy_(resident_cores(cores, self._scaling, self.cores.dtype))
            self.fills[slot] += 1
            self._slot_of[version] = slot
            self._version_of[slot] = version
        self._idle.pop(slot, None)
        self._leases[slot] = self._leases.get(slot, 0) + 1
        if name in self._pins:
            self._pin(name, slot)
        return slot

    def release(self, slot: int) -> None:
        """Give one lease back; the version stays resident until its slot is needed."""
        left = self._leases[slot] - 1
        if left:
            self._leases[slot] = left
        else:
            del self._leases[slot]
            self._idle[slot] = None

    def _pin(self, name: AdapterName, slot: int) -> None:
        """A pin is a lease that ends when another version of the adapter is pinned."""
        before, self._pins[name] = self._pins[name], slot
        if before != slot:
            self._leases[slot] += 1
            if before is not None:
                self.release(before)

    def _take(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        slot, _ = self._idle.popitem(last=False)
        self.evictions += 1
        del self._slot_of[self._version_of.pop(slot)]
        return slot
